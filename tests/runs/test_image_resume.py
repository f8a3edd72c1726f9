"""Stopped, damaged and changed runs of pipelines: what they say, what they refuse, and that nothing is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from raftune.errors import ConfigError
from raftune.evaluation.history import nothing_learned
from raftune.runtime.run import run
from raftune.store.parquet import read_table
from raftune.store.run import RunFolder
from tests.pipelines import save_tiny
from tests.runs.kill import tree
from tests.runs.test_diffusion_families import config, objects

pytestmark = pytest.mark.slow

SHORT: dict[str, Any] = {"num_rounds": 1, "evaluation": {"num_prompts": 0}}


@pytest.mark.parametrize("adapter", [None, {"r": 2}])
def test_a_round_that_keeps_nothing_leaves_a_pipeline_as_it_was(tmp_path: Path, adapter: dict[str, int] | None) -> None:
    """The start is a reference: a round's copy of it draws the start's own images."""
    model = save_tiny("dit", tmp_path / "dit")
    never = {"rule": "threshold", "threshold": 1e9}
    changes = {"num_rounds": 2, "selection": never, "policy": {"adapter": adapter}, "evaluation": {"num_prompts": 1}}
    assert run(config(tmp_path / "run", model, "dit", **changes), objects("dit")).rounds == 2
    folder = RunFolder(tmp_path / "run")
    assert nothing_learned(folder, 1) and nothing_learned(folder, 2)
    draws = [
        [table.column("image_sha256").to_pylist() for table in shards]
        for shards in (
            [read_table(path) for path in sorted(folder.folder(r, "evaluate/generate").glob("*.parquet"))]
            for r in range(3)
        )
    ]
    assert draws[0] and draws[0] == draws[1] == draws[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("resumes")
    model = save_tiny("dit", base / "dit")
    run(config(base / "run", model, "dit", **SHORT), objects("dit"))
    return model, base / "run"


@pytest.fixture
def copied(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": {"diffusion": {"num_inference_steps": 2, "height": 32, "width": 32}}},
            "must be 16 x 16, at which",
        ),
        ({"sampling": {"temperature": 0.5}}, r"sampling\.temperature means nothing to the diffusion family"),
        (
            {"training": {"diffusion": {"min_snr_gamma": 5.0}, "trainer_kwargs": {"neftune_noise_alpha": 5}}},
            "it is of text",
        ),
    ],
)
def test_options_that_a_pipeline_does_not_have_are_refused_before_anything_is_set_aside(
    copied: tuple[Path, Path], changes: dict[str, Any], message: str
) -> None:
    model, root = copied
    before = tree(root)
    with pytest.raises(ConfigError, match=message):
        run(config(root, model, "dit", **SHORT, **changes), objects("dit"), redo="generate")
    assert tree(root) == before and not (root / "superseded").exists()
