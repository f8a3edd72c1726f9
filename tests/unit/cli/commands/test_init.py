"""What `raftune init` writes is a run, for text and for images, and each line of it is a field that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from raftune.cli.commands.init import init
from raftune.config.load import load_config, validate


@pytest.mark.parametrize(("images", "family"), [(False, "causal_lm"), (True, "diffusion")])
def test_what_is_written_is_valid_and_has_the_file_s_name(images: bool, family: str, tmp_path: Path) -> None:
    init(str(tmp_path / "my first.yaml"), images=images)
    config = load_config([tmp_path / "my first.yaml"])
    assert (config.name, config.policy.family) == ("my-first", family)


def test_the_lines_of_images_that_are_commented_out_are_valid_too(tmp_path: Path) -> None:
    init(str(tmp_path / "run.yaml"), images=True)
    text = (tmp_path / "run.yaml").read_text()
    head, body = text.split("\n\n", 1)
    assert head.startswith("#")
    every = re.sub(r"(?m)^( *)# (?=[a-z_]+:|- )", r"\1", body)
    config = validate(yaml.safe_load(every))
    assert config.keep_latents == "selected" and config.training.diffusion.noise_levels == 4
    assert [reward.spec for reward in config.rewards.reward_funcs[:3]] == ["starter", "clip_score", "pick_score"]
