"""One suite for every place where a reward runs: what a reward may do wrong, and the status that it gets for it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raftune.config.rewards import RewardsConfig, RewardSpec
from raftune.records import ScoreStatus
from raftune.rewards import RewardBatch, RewardSet, load_rewards
from raftune.rewards.builtin.aesthetic import save_head
from raftune.rewards.check import example_images
from tests.builders import tiny_clip
from tests.runs.http_judge import judging

LIMIT = 1.5
ACTS = """
import asyncio, os, sys, time
from decimal import Decimal

import numpy as np

print("a print while the file is imported")

RETURNS = {
    "fine": lambda n: [0.5] * n,
    "nan": lambda n: [float("nan")] * n,
    "inf": lambda n: [float("inf")] * n,
    "minus inf": lambda n: [float("-inf")] * n,
    "none": lambda n: [None] * n,
    "too short": lambda n: [0.5] * (n - 1),
    "too long": lambda n: [0.5] * (n + 2),
    "empty": lambda n: [],
    "text": lambda n: ["0.5"] * n,
    "nested": lambda n: [[0.1, 0.2]] * n,
    "complex": lambda n: [1j] * n,
    "a number": lambda n: 0.5,
    "a dict": lambda n: {"reward": 0.5},
    "a string": lambda n: "x" * n,
    "nothing": lambda n: None,
    "beyond float": lambda n: [10**400] * n,
    "booleans": lambda n: [True] * n,
    "numpy": lambda n: np.full(n, 0.25, dtype=np.float32),
    "numpy scalars": lambda n: [np.float16(0.25)] * n,
    "decimals": lambda n: [Decimal("0.25")] * n,
    "a tuple": lambda n: (0.5,) * n,
    "a generator": lambda n: (0.5 for _ in range(n)),
}

def act(completions, act, **kwargs):
    kind = act[0]
    if kind == "raises":
        raise ValueError("no such\\n  judge")
    if kind == "sys.exit":
        sys.exit(3)
    if kind == "hangs":
        time.sleep(30)
    if kind == "slow":
        time.sleep(0.1)
        kind = "fine"
    if kind == "prints":
        print("to stdout")
        print("to stderr", file=sys.stderr)
        os.write(1, b"raw bytes to descriptor 1")
        kind = "fine"
    return RETURNS[kind](len(completions))

async def act_later(completions, act, **kwargs):
    if act[0] in ("hangs", "slow"):
        await asyncio.sleep(30 if act[0] == "hangs" else 0.1)
        act = ["fine"]
    await asyncio.sleep(0)
    return globals()["act"](completions, act)
"""


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "acts.py"
    path.write_text(ACTS)
    return path


@pytest.fixture(scope="module", params=["callable", "async callable", "own process", "async in own process"])
def reward_set(request: pytest.FixtureRequest, acts: Path) -> Iterator[RewardSet]:
    name = "act_later" if "async" in request.param else "act"
    if "process" in request.param:
        made = load_rewards(RewardsConfig(reward_funcs=(f"{acts}:{name}",), timeout=LIMIT))
    else:
        found = importlib.util.spec_from_file_location("acts", acts)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        made = load_rewards(RewardsConfig(timeout=LIMIT), [getattr(module, name)])
    with made:
        yield made


def batch_of(kind: str, size: int = 3) -> RewardBatch:
    return RewardBatch(["q"] * size, ["a"] * size, {"act": [kind] * size})


LINE_OF = {
    words: next(number for number, line in enumerate(ACTS.splitlines(), 1) if words in line)
    for words in ("raise ValueError", "sys.exit(3)")
}
FAILING = {
    "raises": (ScoreStatus.ERROR, f"ValueError: no such judge (acts.py, line {LINE_OF['raise ValueError']})"),
    "sys.exit": (ScoreStatus.ERROR, f"SystemExit: 3 (acts.py, line {LINE_OF['sys.exit(3)']})"),
    "nan": (ScoreStatus.INVALID, "returned nan, not a finite number"),
    "inf": (ScoreStatus.INVALID, "returned inf, not a finite number"),
    "minus inf": (ScoreStatus.INVALID, "returned -inf, not a finite number"),
    "beyond float": (ScoreStatus.INVALID, "returned inf, not a finite number"),
    "too short": (ScoreStatus.INVALID, "returned 2 values for 3 completions"),
    "too long": (ScoreStatus.INVALID, "returned 5 values for 3 completions"),
    "empty": (ScoreStatus.INVALID, "returned 0 values for 3 completions"),
    "text": (ScoreStatus.INVALID, "returned str '0.5', not a number"),
    "nested": (ScoreStatus.INVALID, "returned list [0.1, 0.2], not a number"),
    "complex": (ScoreStatus.INVALID, "returned complex 1j, not a number"),
    "a number": (ScoreStatus.INVALID, "returned float 0.5, not a list of 3 numbers"),
    "a dict": (ScoreStatus.INVALID, "returned dict {'reward': 0.5}, not a list of 3 numbers"),
    "a string": (ScoreStatus.INVALID, "returned str 'xxx', not a list of 3 numbers"),
    "nothing": (ScoreStatus.INVALID, "returned None, not a list of 3 numbers: is a `return` missing?"),
    "none": (ScoreStatus.NOT_APPLICABLE, ""),
}
FINE = {
    "fine": 0.5, "slow": 0.5, "prints": 0.5, "a tuple": 0.5, "a generator": 0.5, "booleans": 1.0, "numpy": 0.25,
    "numpy scalars": 0.25, "decimals": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILING)
def test_a_failure_is_a_status_with_a_detail_and_never_a_number(reward_set: RewardSet, kind: str) -> None:
    status, detail = FAILING[kind]
    scores = reward_set.score(batch_of(kind))
    assert [(score.value, score.status) for score in scores] == [(None, status)] * 3
    part = scores[0].parts[reward_set.names[0]]
    assert part.value is None
    assert part.status is status
    assert part.detail == detail


@pytest.mark.parametrize("kind", FINE)
def test_whatever_reads_as_a_list_of_numbers_is_scored(reward_set: RewardSet, kind: str) -> None:
    assert [(score.value, score.status) for score in reward_set.score(batch_of(kind))] == [
        (FINE[kind], ScoreStatus.OK)
    ] * 3


@pytest.mark.slow
def test_a_hung_call_costs_its_limit_and_little_more_and_the_next_one_is_answered(reward_set: RewardSet) -> None:
    reward_set.score(batch_of("fine"))
    began = time.monotonic()
    score = reward_set.score(batch_of("hangs"))[0]
    assert (score.value, score.status) == (None, ScoreStatus.TIMEOUT)
    assert score.parts[reward_set.names[0]].detail.startswith(f"no answer within {LIMIT} s; ")
    assert LIMIT <= time.monotonic() - began < LIMIT + 20
    assert reward_set.score(batch_of("fine"))[0].value == 0.5


def test_nothing_that_a_call_did_wrong_harms_the_next_one(reward_set: RewardSet) -> None:
    for kind in ("raises", "sys.exit", "nan", "too short"):
        reward_set.score(batch_of(kind))
        assert reward_set.score(batch_of("fine"))[0].value == 0.5


def test_only_the_failing_call_of_several_loses_its_samples(reward_set: RewardSet) -> None:
    mixed = RewardBatch(["q"] * 130, ["a"] * 130, {"act": ["fine"] * 64 + ["raises"] * 64 + ["fine"] * 2})
    statuses = [score.status for score in reward_set.score(mixed)]
    assert statuses == [ScoreStatus.OK] * 64 + [ScoreStatus.ERROR] * 64 + [ScoreStatus.OK] * 2


# -- every built-in reward of images, the judge behind HTTP among them ----------------------------------------------


@pytest.fixture(scope="module")
def image_specs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RewardSpec]]:
    clip = tiny_clip(tmp_path_factory.mktemp("rewards") / "clip")
    head = clip.parent / "head"
    weights = np.random.default_rng(0).normal(size=(1, 12))
    save_head(head, [(weights, np.zeros(1))], clip="../clip")
    with judging() as url:
        yield {
            "clip_score": RewardSpec(spec="clip_score", options={"model": str(clip)}),
            "pick_score": RewardSpec(spec="pick_score", options={"model": str(clip), "processor": str(clip)}),
            "a CLIPModel's folder": RewardSpec(spec=str(clip)),
            "aesthetic": RewardSpec(spec="aesthetic", options={"model": str(head)}),
            "a head's folder": RewardSpec(spec=str(head)),
            "file_size": RewardSpec(spec="file_size"),
            "colour": RewardSpec(spec="colour", options={"measure": "colourfulness"}),
            "http": RewardSpec(spec="http", options={"url": f"{url}/brightness", "batch_size": 3}),
        }


PICTURE_REWARDS = (
    *("clip_score", "pick_score", "a CLIPModel's folder", "aesthetic", "a head's folder"),
    *("file_size", "colour", "http"),
)


@pytest.fixture(scope="module", params=PICTURE_REWARDS)
def image_reward_set(request: pytest.FixtureRequest, image_specs: dict[str, RewardSpec]) -> Iterator[RewardSet]:
    with load_rewards(RewardsConfig(reward_funcs=(image_specs[request.param],))) as made:
        yield made


def values(reward_set: RewardSet, batch: RewardBatch) -> list[float | None]:
    assert all(score.status is ScoreStatus.OK for score in reward_set.score(batch))
    return [score.value for score in reward_set.score(batch)]


@pytest.mark.slow
def test_a_reward_of_images_keeps_the_contract(image_reward_set: RewardSet) -> None:
    """The same values when asked again, in another order and in smaller calls, also of images of several sizes."""
    for batch in (example_images(), example_images(mixed_sizes=True)):
        found = values(image_reward_set, batch)
        assert found == values(image_reward_set, batch)
        assert np.unique(found).size > 4
        backwards = list(reversed(range(len(batch))))
        assert values(image_reward_set, batch.take(backwards)) == pytest.approx(found[::-1], rel=1e-5, abs=1e-6)
        one_by_one = [values(image_reward_set, batch.take([i]))[0] for i in range(0, len(batch), 5)]
        assert one_by_one == pytest.approx(found[::5], rel=1e-5, abs=1e-6)


def test_a_reward_of_images_changes_none(image_reward_set: RewardSet) -> None:
    batch = example_images()
    before = [picture.tobytes() for picture in batch.completions]
    image_reward_set.score(batch)
    assert [picture.tobytes() for picture in batch.completions] == before


def test_a_reward_of_images_fails_on_texts_with_a_status(image_reward_set: RewardSet) -> None:
    if "text" in image_reward_set.rewards[image_reward_set.names[0]].media:
        return
    score = image_reward_set.score(RewardBatch(["a red disc"], ["an answer"]))[0]
    part = score.parts[image_reward_set.names[0]]
    assert (part.status, part.value) == (ScoreStatus.ERROR, None)
    assert "scores images, and a completion is of type str" in part.detail


def test_an_empty_call_gives_nothing(image_reward_set: RewardSet) -> None:
    assert image_reward_set.score(RewardBatch([], [])) == []


# -- a person's own callable on images -------------------------------------------------------------------------------

SEES = """
import numpy as np

def red(completions, prompts, answer, **kwargs):
    kinds = {type(completion).__name__ for completion in completions} | {completion.mode for completion in completions}
    assert kinds == {"Image", "RGB"}, kinds
    assert [text for text in prompts] == answer
    return [float(np.asarray(completion)[..., 0].mean()) for completion in completions]

def spoils(completions, **kwargs):
    for completion in completions:
        completion.paste((0, 0, 0), (0, 0, *completion.size))
    return [0.0] * len(completions)

def wrong(completions, **kwargs):
    return [float("nan"), "x", None, *[1.0] * (len(completions) - 3)]
"""


@pytest.fixture(scope="module")
def sees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "sees.py"
    path.write_text(SEES)
    return path


def loaded(path: Path, *names: str) -> list[Any]:
    found = importlib.util.spec_from_file_location("sees", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return [getattr(module, name) for name in names]


def test_a_callable_gets_the_same_images_as_an_object_and_in_its_own_process(sees: Path) -> None:
    batch = example_images(mixed_sizes=True)
    expected = [float(np.asarray(picture)[..., 0].mean()) for picture in batch.completions]
    with load_rewards(RewardsConfig(reward_funcs=(f"{sees}:red",)), loaded(sees, "red")) as reward_set:
        scores = reward_set.score(batch)
    for name in ("red", "red_2"):
        assert [score.parts[name].value for score in scores] == expected


def test_a_callable_that_modifies_its_images_changes_no_other_copy(sees: Path) -> None:
    batch = example_images()
    before = [picture.tobytes() for picture in batch.completions]
    with load_rewards(RewardsConfig(reward_funcs=(f"{sees}:spoils",)), loaded(sees, "spoils", "red")) as reward_set:
        scores = reward_set.score(batch)
    assert [picture.tobytes() for picture in batch.completions] == before
    assert max(score.parts["red"].value or 0 for score in scores) > 100


@pytest.mark.parametrize("hosted", [False, True])
def test_a_callable_on_images_fails_as_one_on_texts(sees: Path, hosted: bool) -> None:
    specs, objects = ((f"{sees}:wrong",), []) if hosted else ((), loaded(sees, "wrong"))
    with load_rewards(RewardsConfig(reward_funcs=specs), objects) as reward_set:
        statuses = [score.status for score in reward_set.score(example_images())]
    assert statuses == [ScoreStatus.INVALID, ScoreStatus.INVALID, ScoreStatus.NOT_APPLICABLE, *[ScoreStatus.OK] * 13]
