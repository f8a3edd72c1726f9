"""One suite for every place where a reward runs: what a reward may do wrong, and the status that it gets for it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftune.config.rewards import RewardsConfig
from raftune.records import Status
from raftune.rewards import Batch, Panel, load_panel

LIMIT = 0.7
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
        time.sleep(0.3)
        kind = "fine"
    if kind == "prints":
        print("to stdout")
        print("to stderr", file=sys.stderr)
        os.write(1, b"raw bytes to descriptor 1")
        kind = "fine"
    return RETURNS[kind](len(completions))

async def act_later(completions, act, **kwargs):
    if act[0] in ("hangs", "slow"):
        await asyncio.sleep(30 if act[0] == "hangs" else 0.3)
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
def panel(request: pytest.FixtureRequest, acts: Path) -> Iterator[Panel]:
    name = "act_later" if "async" in request.param else "act"
    if "process" in request.param:
        made = load_panel(RewardsConfig(reward_funcs=(f"{acts}:{name}",), timeout=LIMIT))
    else:
        found = importlib.util.spec_from_file_location("acts", acts)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        made = load_panel(RewardsConfig(timeout=LIMIT), [getattr(module, name)])
    with made:
        yield made


def asked(kind: str, size: int = 3) -> Batch:
    return Batch(["q"] * size, ["a"] * size, {"act": [kind] * size})


FAILING = {
    "raises": (Status.ERROR, "ValueError: no such judge"),
    "sys.exit": (Status.ERROR, "SystemExit: 3"),
    "nan": (Status.INVALID, "returned nan, not a finite number"),
    "inf": (Status.INVALID, "returned inf, not a finite number"),
    "minus inf": (Status.INVALID, "returned -inf, not a finite number"),
    "beyond float": (Status.INVALID, "returned inf, not a finite number"),
    "too short": (Status.INVALID, "returned 2 values for 3 completions"),
    "too long": (Status.INVALID, "returned 5 values for 3 completions"),
    "empty": (Status.INVALID, "returned 0 values for 3 completions"),
    "text": (Status.INVALID, "returned str '0.5', not a number"),
    "nested": (Status.INVALID, "returned list [0.1, 0.2], not a number"),
    "complex": (Status.INVALID, "returned complex 1j, not a number"),
    "a number": (Status.INVALID, "returned float 0.5, not a list of 3 numbers"),
    "a dict": (Status.INVALID, "returned dict {'reward': 0.5}, not a list of 3 numbers"),
    "a string": (Status.INVALID, "returned str 'xxx', not a list of 3 numbers"),
    "nothing": (Status.INVALID, "returned None, not a list of 3 numbers: is a `return` missing?"),
    "none": (Status.NOT_APPLICABLE, ""),
}
FINE = {
    "fine": 0.5, "slow": 0.5, "prints": 0.5, "a tuple": 0.5, "a generator": 0.5, "booleans": 1.0, "numpy": 0.25,
    "numpy scalars": 0.25, "decimals": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILING)
def test_a_failure_is_a_status_with_a_detail_and_never_a_number(panel: Panel, kind: str) -> None:
    status, detail = FAILING[kind]
    scores = panel.score(asked(kind))
    assert [(score.value, score.status) for score in scores] == [(None, status)] * 3
    part = scores[0].parts[panel.names[0]]
    assert part.value is None
    assert part.status is status
    assert part.detail == detail


@pytest.mark.parametrize("kind", FINE)
def test_whatever_reads_as_a_list_of_numbers_is_scored(panel: Panel, kind: str) -> None:
    assert [(score.value, score.status) for score in panel.score(asked(kind))] == [(FINE[kind], Status.OK)] * 3


def test_a_hung_call_costs_its_limit_and_little_more_and_the_next_one_is_answered(panel: Panel) -> None:
    panel.score(asked("fine"))
    began = time.monotonic()
    score = panel.score(asked("hangs"))[0]
    assert (score.value, score.status) == (None, Status.TIMEOUT)
    assert score.parts[panel.names[0]].detail.startswith("no answer within 0.7 s; ")
    assert LIMIT <= time.monotonic() - began < LIMIT + 3
    assert panel.score(asked("fine"))[0].value == 0.5


def test_nothing_that_a_call_did_wrong_harms_the_next_one(panel: Panel) -> None:
    for kind in ("raises", "sys.exit", "nan", "too short"):
        panel.score(asked(kind))
        assert panel.score(asked("fine"))[0].value == 0.5


def test_only_the_failing_call_of_several_loses_its_samples(panel: Panel) -> None:
    mixed = Batch(["q"] * 130, ["a"] * 130, {"act": ["fine"] * 64 + ["raises"] * 64 + ["fine"] * 2})
    statuses = [score.status for score in panel.score(mixed)]
    assert statuses == [Status.OK] * 64 + [Status.ERROR] * 64 + [Status.OK] * 2
