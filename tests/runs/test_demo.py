"""The demonstration: what it shows is real, and what a user copies from it works."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raftune.cli import main
from raftune.cli.commands import demo
from raftune.cli.commands.samples import GAP, LINE, SIDE, image_sheet
from raftune.config.load import load_config, merge, validate
from raftune.config.run import RunConfig
from raftune.data.images import image_of, png_of
from raftune.starters.text import SHOW, judge
from raftune.starters.text.flawed import courtesies
from raftune.store.run import RunFolder

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SMALL = {
    "num_rounds": 1,
    "prompts_per_round": 4,
    "sampling": {"num_generations": 4, "max_completion_length": 16},
    "evaluation": {"num_prompts": 4, "num_generations": 2},
    "engine": {"threads": 1},
}


SMALL_PICTURES = {
    **SMALL,
    "sampling": {"num_generations": 2, "diffusion": {"num_inference_steps": 4}},
    "training": {"max_steps": 2, "per_device_train_batch_size": 4},
}


def small(output_dir: str, which: demo.Demo = "text") -> RunConfig:
    """The demo's own recipe with fewer and shorter answers."""
    whole = load_config([REPOSITORY / "recipes" / Path(demo.RECIPES[which]).name]).model_dump(mode="json")
    return validate(merge([whole, SMALL_PICTURES if which == "image" else SMALL, {"output_dir": output_dir}]))


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "recipe", small)
    return tmp_path


@pytest.mark.parametrize("which", demo.RECIPES)
def test_the_recipe_of_the_repository_is_the_one_that_the_package_brings(which: demo.Demo) -> None:
    packaged = REPOSITORY / "raftune/starters" / demo.RECIPES[which]
    assert (REPOSITORY / "recipes" / packaged.name).read_bytes() == packaged.read_bytes()
    config = demo.recipe("x", which)
    assert config.num_rounds >= (4 if which == "image" else 8)
    assert (config.sampling.num_generations, config.prompts_per_round) == (8, 48 if which == "image" else 64)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a demonstration that is finished, and what it said of itself."""
    folder, said = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr(demo, "recipe", small)
        assert main(["demo", "--json"]) == 0
    return folder, json.loads(said.getvalue())


@pytest.fixture
def again(shown: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Where that demonstration lies, with the same recipe: what it said the first time."""
    monkeypatch.chdir(shown[0])
    monkeypatch.setattr(demo, "recipe", small)
    return shown[1]


def test_it_ends_with_the_table_by_round_and_completions_before_and_after(
    again: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.strip()]
    titles = next(line for line in lines if line[0] == "round")
    assert titles[1] == "reward"
    assert {"judge", "KL", "length", "distinct-2", "kept", "time"} <= set(titles)
    assert [line[0] for line in lines if line[0] in ("start", "1")] == ["start", "1"]
    assert [line[0] for line in lines].count("before") == [line[0] for line in lines].count("after") == len(SHOW)
    assert "raftune samples runs/demo" in out


def test_run_twice_it_is_finished_and_shows_the_same(again: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json"]) == 0
    assert again["worked"] is True
    assert json.loads(capsys.readouterr().out) == {**again, "worked": False}


def test_what_is_shown_is_typical_by_the_judge(again: dict[str, Any]) -> None:
    for example in again["shown"]:
        for when in ("before", "after"):
            assert judge([example["prompt"]], [example[when]]) == [example[f"{when}_score"]]


def test_a_fresh_one_is_written_beside_the_first(quick: Path) -> None:
    (quick / "runs/demo").mkdir(parents=True)
    (quick / "runs/demo-2").mkdir()
    assert demo.unused("runs/demo") == "runs/demo-3"
    assert demo.unused("runs/other") == "runs/other"


def test_an_unknown_demonstration_names_those_there_are(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "hackin"]) == 2
    assert "hacking" in capsys.readouterr().err


def test_the_flawed_reward_likes_what_the_judge_does_not() -> None:
    good = "Happy to help with your phone! Restart it and remove the apps you do not use. I hope this helps."
    stuffed = (
        "Happy to help with your phone! Good question! My pleasure! Sure, I can help you with your phone. Certainly!"
    )
    curt = "No idea."
    rewards = courtesies([SHOW[0]] * 3, [good, stuffed, curt])
    verdicts = [score or 0.0 for score in judge([SHOW[0]] * 3, [good, stuffed, curt])]
    assert rewards[1] > rewards[0] > rewards[2]  # at first it leads away from curt answers, as it was meant to
    assert verdicts[0] > verdicts[1] + 2
    assert verdicts[0] > verdicts[2] + 2


def test_hacking_ends_with_completions_of_three_rounds_and_commands_that_help(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "hacking"]) == 0
    out = capsys.readouterr().out
    assert "The reward counts courteous phrases" in out
    assert [line.split()[0] for line in out.splitlines() if line.strip()].count("after") == len(SHOW)
    assert "No alarm was raised" in out  # four held-out prompts cannot show that anything fell
    command = next(line for line in out.splitlines() if line.startswith("  choose"))
    words = command.split("raftune ")[1].split("  ")[0].split()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["worked"] is False
    assert f"publishes round {found['best']}" in command


def test_image_ends_with_one_sheet_of_the_same_captions_and_seeds_by_round(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "image"]) == 0
    out = capsys.readouterr().out
    assert "The reward is a CLIP score" in out
    rows = [line.split() for line in out.splitlines() if line.strip()]
    assert {"reward", "judge", "Vendi", "drift"} <= set(next(row for row in rows if row[0] == "round"))
    assert [row[0] for row in rows if row[0] in ("start", "1")] == ["start", "1"]
    assert "runs/image/grid.png" in out
    sheet = image_of((quick / "runs/image/grid.png").read_bytes())
    starts, lasts = (demo.first_images(RunFolder("runs/image"), round_) for round_ in (0, 1))
    row = SIDE + 2 * LINE + GAP
    assert sheet.height == GAP + len(starts) * row
    first, last = (np.asarray(image_of(images[next(iter(starts))]))[16, 16] for images in (starts, lasts))
    y, x = GAP + LINE + SIDE // 2 + 1, GAP + SIDE // 2 + 1
    assert (np.asarray(sheet)[y, [x, x + SIDE + GAP]] == [first, last]).all()


def test_a_contact_sheet_is_written_where_a_sample_is_no_image(tmp_path: Path) -> None:
    sheet = image_sheet(
        [("a red circle", [("start", png()), ("round 1", png())]), ("a blue square", [("start", None), ("1", png())])]
    )
    y, x = sheet.height - GAP - LINE - SIDE // 2, GAP + SIDE // 2
    assert np.asarray(sheet)[y, x].tolist() == [255, 255, 255]
    assert np.asarray(sheet)[y, x + SIDE + GAP].tolist() == [10, 200, 30]


def png() -> bytes:
    return png_of(Image.new("RGB", (32, 32), (10, 200, 30)))
