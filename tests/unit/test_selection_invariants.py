"""What holds of selection for any table of candidates, and at the size of a large round."""

import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from selection_tables import CONFIGS, LOCAL, assert_same, choose, kept, prompts, random_table, rows

from raftune.selection import REASONS, Candidates, Reason, Verdicts, without_candidates


@pytest.mark.parametrize("fields", CONFIGS)
def test_the_order_of_rows_changes_no_verdict(fields: dict[str, Any]) -> None:
    for trial in range(10):
        table = random_table(trial)
        shuffle = np.random.default_rng(trial).permutation(len(table.group))
        whole, mixed = choose(table, 7, **fields), choose(rows(table, shuffle), 7, **fields)
        assert_same(Verdicts(whole.rank[shuffle], whole.weight[shuffle], whole.reason[shuffle]), mixed)


@pytest.mark.parametrize("fields", LOCAL)
def test_the_verdict_of_a_prompt_does_not_depend_on_other_prompts(fields: dict[str, Any]) -> None:
    table = random_table(11)
    half = np.flatnonzero(table.group % 2 == 0)
    whole, part = choose(table, 7, **fields), choose(rows(table, half), 7, **fields)
    assert_same(Verdicts(whole.rank[half], whole.weight[half], whole.reason[half]), part)


@pytest.mark.parametrize("fields", CONFIGS)
def test_ranks_count_from_one_without_gaps_and_weights_are_finite(fields: dict[str, Any]) -> None:
    table = random_table(12)
    verdicts = choose(table, **fields)
    assert np.isfinite(verdicts.weight).all() and (verdicts.weight >= 0).all()
    assert (verdicts.weight[verdicts.rank == 0] == 0).all()
    for group in np.unique(table.group):
        competing = (table.group == group) & (verdicts.rank > 0)
        order = np.flatnonzero(competing)[np.argsort(verdicts.rank[competing])]
        assert verdicts.rank[order].tolist() == list(range(1, len(order) + 1))
        assert sorted(order, key=lambda i: (-table.score[i], table.k[i])) == order.tolist()


def test_a_plain_loop_over_prompts_selects_the_same() -> None:
    for trial in range(20):
        table = random_table(100 + trial)
        fields = {"min_length": 2, "max_length": 8, "drop_duplicates": True, "margin": 0.5, "all_equal": "skip"}
        expected = [i for group in np.unique(table.group) for i in _plainly(table, group, m=2)]
        assert kept(choose(table, rule="top_m", m=2, **fields)) == sorted(expected)


def _plainly(table: Candidates, group: int, m: int) -> list[int]:
    standing: dict[int, int] = {}
    for i in sorted(np.flatnonzero(table.group == group).tolist(), key=lambda i: table.k[i]):
        if np.isfinite(table.score[i]) and 2 <= table.length[i] <= 8:
            standing.setdefault(int(table.content[i]), i)
    scores = [table.score[i] for i in standing.values()]
    if not scores or max(scores) - np.mean(scores) < 0.5 or len(set(scores)) == 1:
        return []
    return sorted(standing.values(), key=lambda i: (-table.score[i], table.k[i]))[:m]


def test_no_candidates_make_no_verdicts() -> None:
    for fields in CONFIGS:
        verdicts = choose(prompts(), **fields)
        assert len(verdicts.rank) == len(verdicts.weight) == len(verdicts.reason) == 0
        assert without_candidates(prompts(), verdicts) == {}


def test_columns_are_left_as_they_were() -> None:
    table = random_table(2)
    table = replace(table, invalid=np.random.default_rng(3).random(len(table.k)) < 0.1)
    before = [column.copy() for column in vars(table).values()]
    for fields in CONFIGS:
        choose(table, **fields)
    for column, copy in zip(vars(table).values(), before, strict=True):
        np.testing.assert_array_equal(column, copy)


def test_two_candidates_of_one_name_are_our_own_bug() -> None:
    table = prompts([1, 1])
    twins = Candidates(table.group, np.zeros(2, np.int32), table.score, table.length, table.content)
    with pytest.raises(AssertionError, match="have the same k"):
        choose(twins)


def test_every_reason_occurs_and_keeps_or_rejects_always() -> None:
    seen: dict[int, set[bool]] = {reason: set() for reason in Reason}
    extra = [{"rule": "softmax", "temperature": 1e-3}, {"min_length": 3}, {"max_length": 4, "drop_duplicates": True}]
    for fields in [*CONFIGS, *extra]:
        table = random_table(1)
        verdicts = choose(replace(table, invalid=np.isnan(table.score) & (table.k > 2)), **fields)
        for reason, weight in zip(verdicts.reason.tolist(), verdicts.weight.tolist(), strict=True):
            seen[reason].add(weight > 0)
    assert all(len(outcomes) == 1 for outcomes in seen.values()), seen
    assert {REASONS[reason] for reason, outcomes in seen.items() if outcomes == {True}} == {
        "best of its prompt",
        "among the best of its prompt",
        "inside the kept fraction",
        "reaches the threshold",
        "weighted by its score",
        "kept by chance (control)",
        "the only candidate of its prompt",
        "kept with nothing to rank: all candidates score the same",
    }


def test_the_empty_prompts_are_those_without_weight() -> None:
    for fields in CONFIGS:
        table = random_table(21)
        verdicts = choose(table, **fields)
        fruitful = {int(group) for group in table.group[verdicts.weight > 0]}
        assert set(without_candidates(table, verdicts)) == set(table.group.tolist()) - fruitful


# -- at scale --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", {fields.get("rule"): fields for fields in CONFIGS}.values())
def test_a_million_candidates_take_seconds_and_little_memory(fields: dict[str, Any]) -> None:
    n = 1_000_000
    rng = np.random.default_rng(0)
    order = rng.permutation(n)
    table = Candidates(
        group=(order // 8).astype(np.int64),
        k=(order % 8).astype(np.int32),
        score=rng.integers(0, 50, n).astype(np.float64),
        length=rng.integers(1, 10, n),
        content=rng.integers(0, 5, n).astype(np.uint64),
    )
    tracemalloc.start()
    began = time.perf_counter()
    verdicts = choose(table, **fields)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verdicts.weight.sum() > 0
    assert seconds < 10, f"{seconds:.1f} s; about 0.4 s on a free machine"
    assert peak < 200 * n, f"{peak / n:.0f} bytes a candidate; about 90 are needed"


def test_selection_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, raftune.selection; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
