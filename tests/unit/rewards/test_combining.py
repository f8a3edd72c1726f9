"""What each reward counts in the score: weights, thresholds and ranks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raftune.config.load import validate_as
from raftune.config.rewards import RewardsConfig, RewardSpec
from raftune.errors import ConfigError
from raftune.records import RewardPart, ScoreStatus
from raftune.rewards import RewardBatch, load_rewards
from raftune.rewards.combining import Combine, RewardShare, combined, numbered, ranks, with_counts

FAILED = {
    "error": RewardPart(None, ScoreStatus.ERROR, "broke"),
    "timeout": RewardPart(None, ScoreStatus.TIMEOUT, "slow"),
    "invalid": RewardPart(None, ScoreStatus.INVALID, "nan"),
}
NOTHING = RewardPart(None, ScoreStatus.NOT_APPLICABLE)


def parts(**columns: list[Any]) -> list[dict[str, RewardPart]]:
    """Rows of parts: a number is a value, None does not apply, a word is a failure."""

    def part(value: Any) -> RewardPart:
        return (
            NOTHING if value is None else FAILED[value] if isinstance(value, str) else RewardPart(value, ScoreStatus.OK)
        )

    return [
        {name: part(values[i]) for name, values in columns.items()} for i in range(len(next(iter(columns.values()))))
    ]


def scores(
    rows: list[dict[str, RewardPart]], how: Combine = "sum", groups: list[Any] | None = None, **shares: RewardShare
) -> list[float | None]:
    given = {name: shares.get(name, RewardShare()) for name in rows[0]}
    return [score.value for score in combined(rows, given, how, groups or ["p"] * len(rows))]


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_a_rank_goes_from_0_for_the_lowest_to_1_for_the_highest() -> None:
    assert ranks(np.array([3.0, -1.0, 10.0, 4.0, 5.0]), np.zeros(5, np.int64)).tolist() == [0.25, 0.0, 1.0, 0.5, 0.75]


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert ranks(np.array([1.0, 2.0, 2.0, 3.0]), np.zeros(4, np.int64)).tolist() == [0.0, 0.5, 0.5, 1.0]
    assert ranks(np.array([7.0, 7.0, 7.0]), np.zeros(3, np.int64)).tolist() == [0.5, 0.5, 0.5]


def test_one_alone_has_the_middle() -> None:
    assert ranks(np.array([7.0]), np.zeros(1, np.int64)).tolist() == [0.5]
    assert ranks(np.zeros(0), np.zeros(0, np.int64)).tolist() == []


def test_ranks_agree_with_counting_pairs_and_average_to_one_half() -> None:
    """The definition: of all others of the group, the share below, and half of those that are equal."""
    random = np.random.default_rng(0)
    values, groups = random.integers(0, 5, 200).astype(np.float64), random.integers(0, 12, 200)
    found = ranks(values, groups)
    for i, group in enumerate(groups):
        others = [j for j in np.flatnonzero(groups == group) if j != i]
        expected = np.mean([(values[i] > values[j]) + (values[i] == values[j]) / 2 for j in others]) if others else 0.5
        assert found[i] == pytest.approx(expected)
    for group in range(12):
        assert found[groups == group].mean() == pytest.approx(0.5)


def test_any_increasing_map_of_a_reward_leaves_its_ranks() -> None:
    values, groups = np.random.default_rng(1).normal(size=60), np.arange(60) // 8
    np.testing.assert_array_equal(ranks(values, groups), ranks(np.exp(values) * 1000, groups))


def test_no_scale_dominates_a_score_by_rank() -> None:
    rows = parts(small=[0.1, 0.2, 0.3], huge=[3e6, 2e6, 1e6])
    assert scores(rows, "rank") == [1.0, 1.0, 1.0]
    assert scores(rows) == [3000000.1, 2000000.2, 1000000.3]


def test_ranks_are_weighted() -> None:
    rows = parts(good=[0.1, 0.2], bad=[5.0, 9.0])
    assert scores(rows, "rank", good=RewardShare(3.0), bad=RewardShare(-1.0)) == [0.0, 2.0]


def test_each_prompt_is_ranked_by_itself() -> None:
    rows = parts(a=[1.0, 2.0, 100.0, 50.0])
    assert scores(rows, "rank", ["p", "p", "q", "q"]) == [0.0, 1.0, 1.0, 0.0]
    assert scores(rows, "rank", ["p", "q", "p", "q"]) == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("failure", FAILED)
def test_a_failed_sample_has_no_score_and_is_ranked_against_nobody(failure: str) -> None:
    rows = parts(a=[1.0, 2.0, 3.0, 9.0], b=[0.0, 0.0, 0.0, failure])
    found = combined(rows, {"a": RewardShare(), "b": RewardShare()}, "rank", ["p"] * 4)
    assert [score.value for score in found] == [0.5, 1.0, 1.5, None]
    assert found[3].status is ScoreStatus(failure)
    assert found[3].parts["a"].value == 9.0  # the ledger keeps what the others said


def test_a_part_that_does_not_apply_counts_nothing_and_is_not_ranked() -> None:
    rows = parts(a=[1.0, None, 3.0], b=[1.0, 2.0, 3.0])
    assert scores(rows, "rank") == [0.0, 0.5, 2.0]
    found = combined(parts(a=[None]), {"a": RewardShare()}, "rank", ["p"])[0]
    assert (found.value, found.status) == (None, ScoreStatus.NOT_APPLICABLE)


def test_groups_are_numbered_in_the_order_of_their_first_samples() -> None:
    assert numbered(["b", "a", "b", 3]).tolist() == [0, 1, 0, 2]


# -- thresholds --------------------------------------------------------------------------------------------------------


def test_a_threshold_counts_all_or_nothing_and_includes_its_bound() -> None:
    rows = parts(a=[0.9, 1.0, 1.5, 2.0, 2.1])
    assert scores(rows, a=RewardShare(3.0, at_least=1.0)) == [0.0, 3.0, 3.0, 3.0, 3.0]
    assert scores(rows, a=RewardShare(3.0, at_most=2.0)) == [3.0, 3.0, 3.0, 3.0, 0.0]
    assert scores(rows, a=RewardShare(-1.0, at_least=1.0, at_most=2.0)) == [0.0, -1.0, -1.0, -1.0, 0.0]


def test_a_threshold_counts_as_much_beside_ranks() -> None:
    rows = parts(a=[1.0, 2.0, 3.0], b=[0.0, 1.0, 1.0])
    assert scores(rows, "rank", b=RewardShare(10.0, at_least=0.5)) == [0.0, 10.5, 11.0]


def test_a_part_that_does_not_apply_keeps_no_threshold() -> None:
    assert scores(parts(a=[None, 1.0], b=[1.0, 1.0]), a=RewardShare(1.0, at_most=5.0)) == [1.0, 2.0]


def test_thresholds_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"at_least must not exceed at_most; got 2 and 1 for 'length'.*swap them"):
        validate_as(RewardsConfig, {"reward_funcs": [{"spec": "length", "at_least": 2, "at_most": 1}]})
    with pytest.raises(ConfigError, match="at_least"):
        validate_as(RewardsConfig, {"reward_funcs": [{"spec": "length", "at_least": float("nan")}]})


# -- sets of rewards ---------------------------------------------------------------------------------------------------


def config(how: Combine = "sum", **changes: Any) -> RewardsConfig:
    specs = (
        RewardSpec(spec="length", options={"target": 2, "unit": "characters"}, **changes),
        RewardSpec(spec="repetition"),
    )
    return RewardsConfig(reward_funcs=specs, combine=how, batch_size=2)


BATCH = RewardBatch(["p", "p", "q", "p", "q"], ["ab", "abc", "abcd", "abcde", "a b a b"])


def test_ranks_reach_over_the_calls_of_a_reward() -> None:
    with load_rewards(config("rank")) as rewards:
        found = rewards.score(BATCH)
    raw = [[score.parts[name].value for score in found] for name in ("length", "repetition")]
    expected = sum(ranks(np.array(column), numbered(BATCH.prompts)) for column in raw)
    assert [score.value for score in found] == pytest.approx(list(expected))
    assert raw[0] == [0.0, -0.5, -1.0, -1.5, -2.5]


def test_prompts_of_equal_content_can_be_distinguished() -> None:
    with load_rewards(config("rank")) as rewards:
        alone = rewards.score(BATCH, groups=range(len(BATCH)))
        assert [score.value for score in alone] == [1.0] * 5
        summed = rewards.by_sum().score(BATCH)
        assert summed[1].value == pytest.approx(summed[1].parts["length"].value + summed[1].parts["repetition"].value)


def test_the_fingerprint_follows_the_way_of_combining_and_the_thresholds() -> None:
    prints = []
    for how, changes in itertools.product(
        ("sum", "rank"), ({}, {"at_least": 0.0}, {"at_most": 0.0}, {"at_least": 0.1})
    ):
        with load_rewards(config(how, **changes)) as rewards:
            prints.append(rewards.fingerprint)
            with load_rewards(config("sum", **changes)) as other:
                assert rewards.by_sum().fingerprint == other.fingerprint
    assert len(set(prints)) == 8


# -- what the guards look at -------------------------------------------------------------------------------------------


def test_counted_values_are_stored_beside_raw_values_where_they_differ() -> None:
    table = pa.table(
        {
            "prompt_id": ["p", "p", "p", "q"],
            "score": [1.0, 2.0, None, 1.0],
            "rewards/a": [10.0, 20.0, 30.0, 5.0],
            "rewards/b": [0.0, 1.0, 1.0, None],
        }
    )
    shares = {"a": RewardShare(), "b": RewardShare(2.0, at_least=0.5)}
    assert with_counts(table, {"a": RewardShare()}, "sum") is table
    by_sum = with_counts(table, shares, "sum")
    assert by_sum.column_names == [*table.column_names, "counts/b"]
    assert by_sum.column("counts/b").to_pylist() == [0.0, 1.0, None, None]
    by_rank = with_counts(table, shares, "rank")
    assert by_rank.column("counts/a").to_pylist() == [0.0, 1.0, None, 0.5]
    assert by_rank.column("counts/b").to_pylist() == [0.0, 1.0, None, None]
