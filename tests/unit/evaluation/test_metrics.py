"""Metrics of an evaluation against closed forms, on tables as the stages write them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raftune.evaluation.bootstrap import interval, ratio_interval
from raftune.evaluation.metrics import METRICS, EntropyMetrics, KLMetrics, PerplexityMetrics, TextMetrics
from raftune.results.summary import cell, columns_for, ends_of, measures, row_of, spread

P = np.array([1, 2, 5]) / 8  # of three answers: eight samples hold each as often as it is generated on average


def samples_of(p: Any, prompts: int = 3, size: int = 8) -> pa.Table:
    counts = np.round(np.asarray(p) * size).astype(int)
    answers = np.tile(np.repeat(np.arange(len(p)), counts), prompts)
    ids = np.repeat([f"p{i}" for i in range(prompts)], size)
    return pa.table({"prompt_id": ids, "completion": answers, "log_prob": np.log(np.asarray(p))[answers]})


def test_entropy_is_that_of_the_law_on_samples_in_its_own_proportions() -> None:
    found = EntropyMetrics()(samples_of(P))["entropy"]
    assert found["mean"] == pytest.approx(-(P * np.log(P)).sum(), rel=1e-12)
    assert found["n"] == 3
    assert EntropyMetrics()(samples_of(np.ones(4) / 4))["entropy"]["mean"] == pytest.approx(math.log(4), rel=1e-12)


def test_entropy_is_unbiased_where_samples_are_generated() -> None:
    """The mean over 4,000 prompts lies within 5 standard errors of the truth: by chance it does not once in 1e6."""
    generator = np.random.default_rng(0)
    answers = generator.choice(3, p=P, size=4000 * 2)
    nats = np.log(P)[answers]
    table = pa.table({"prompt_id": np.repeat(np.arange(4000).astype(str), 2), "log_prob": nats})
    error = nats.std() / math.sqrt(len(nats))
    assert abs(EntropyMetrics()(table)["entropy"]["mean"] + (P * np.log(P)).sum()) < 5 * error


def test_entropy_per_token_is_the_ratio_of_sums_and_needs_no_second_pass() -> None:
    noted = [[-1.0, -2.0], [-0.5], [-4.0, -1.0, -1.0]]
    table = pa.table(
        {
            "prompt_id": ["a", "a", "b"],
            "completion_ids": [[1, 2], [2], [3, 3, 2]],
            "completion_logprobs": pa.array(noted, pa.list_(pa.float32())),
        }
    )
    found = EntropyMetrics()(table)
    assert found["entropy"]["mean"] == pytest.approx(((3 + 0.5) / 2 + 6) / 2)
    assert found["entropy_per_token"]["mean"] == pytest.approx(9.5 / 6)
    assert found["entropy_per_token"]["n"] == 2


def test_what_is_sharpened_by_a_temperature_is_measured_as_a_cross_entropy() -> None:
    """At temperature 1/2 the samples follow p², and the mean of -log p over them is no entropy of p or p²."""
    sharp = P**2 / (P**2).sum()
    size = 30  # 1, 4 and 25 of them
    counts = np.round(sharp * size).astype(int)
    assert counts.sum() == size
    answers = np.repeat(np.arange(3), counts)
    table = pa.table({"prompt_id": ["a"] * size, "log_prob": np.log(P)[answers]})
    assert EntropyMetrics()(table)["entropy"]["mean"] == pytest.approx(-(sharp * np.log(P)).sum(), rel=1e-12)


def references(*rows: tuple[float | None, int | None]) -> pa.Table:
    names = [f"p{i}" for i in range(len(rows))]
    values, tokens = (list(column) for column in zip(*rows, strict=True))
    return pa.table(
        {
            "prompt_id": names,
            "reference_log_prob": pa.array(values, pa.float64()),
            "tokens": pa.array(tokens, pa.int64()),
        }
    )


def test_perplexity_is_exp_of_nats_over_tokens() -> None:
    found = PerplexityMetrics()(references(*[(-3.0, 2), (-5.0, 10)] * 3, (None, None)))
    assert found["perplexity"]["mean"] == pytest.approx(math.exp(8 / 12))
    assert found["perplexity"]["low"] <= found["perplexity"]["mean"] <= found["perplexity"]["high"]
    assert found["perplexity"]["n"] == 6
    assert found["references"] == {"measured": 6, "left_out": 1, "impossible": 0}


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary_exactly() -> None:
    found = PerplexityMetrics()(references(*[(-n * math.log(50), n) for n in (1, 3, 9, 2, 4)]))["perplexity"]
    assert [found[name] for name in ("mean", "low", "high")] == pytest.approx([50.0] * 3)


def test_an_impossible_completion_makes_the_perplexity_infinite_and_is_not_dropped() -> None:
    found = PerplexityMetrics()(references((-3.0, 2), (-math.inf, 1)))
    assert found == {"perplexity": None, "references": {"measured": 1, "left_out": 0, "impossible": 1}}


def test_without_a_usable_completion_there_is_no_perplexity() -> None:
    assert PerplexityMetrics()(references((None, None)))["perplexity"] is None


def test_texts_are_measured_over_all_and_inside_a_prompt() -> None:
    table = pa.table({"prompt_id": ["a", "a", "b", "b"], "completion": ["red fox", "Red fox.", "one", "two"]})
    found = TextMetrics()(table)
    assert (found["distinct_1"], found["unique_1"]) == (4 / 6, 2)
    assert (found["distinct_2"], found["unique_2"]) == (1 / 2, 0)
    assert found["similarity"]["mean"] == pytest.approx(0.5)
    assert found["similarity"]["n"] == 2
    assert found["msttr_100"] is None


def test_one_completion_a_prompt_is_similar_to_nothing() -> None:
    assert TextMetrics()(pa.table({"prompt_id": ["a", "b"], "completion": ["x", "x"]}))["similarity"] is None


def test_chunks_of_a_table_are_measured_as_a_whole() -> None:
    whole = pa.table({"prompt_id": ["a", "a", "b"], "completion": ["x y", "y z x", "x y"]})
    assert TextMetrics()(pa.concat_tables([whole.slice(0, 2), whole.slice(2)])) == TextMetrics()(whole)


def test_every_metric_says_what_it_needs() -> None:
    known = {"scores", "text", "image", "features", "invalid", "log_probs", "own_log_probs", "references"}
    assert all(metric.needs and metric.needs <= known for metric in METRICS.values())


def test_a_ratio_leaves_out_prompts_without_anything_below() -> None:
    found = ratio_interval(np.array([1.0, 2.0, np.nan, 7.0]), np.array([1.0, 3.0, 1.0, 0.0]))
    assert found is not None
    assert (found["mean"], found["n"]) == (0.75, 2)
    assert ratio_interval(np.array([np.nan]), np.array([1.0])) is None


def test_a_ratio_s_interval_holds_the_truth_as_often_as_it_says() -> None:
    """95 % of 300 intervals, within 4.75 standard errors (1.26 % each): by chance it fails once in 1e6."""
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        tokens = generator.integers(1, 20, 60).astype(np.float64)
        found = ratio_interval(tokens * 2.0 + generator.normal(size=60) * tokens, tokens)
        assert found is not None
        held += found["low"] <= 2.0 <= found["high"]
    assert abs(held / 300 - 0.94) < 4.75 * 0.0126  # the percentile bootstrap is a little narrow at 60 prompts


@pytest.mark.parametrize("n", range(1, 8))
def test_fewer_than_five_prompts_have_a_mean_and_no_interval(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    for found in (interval(values), ratio_interval(values, np.ones(n))):
        assert found is not None
        assert (found["mean"], found["n"]) == (pytest.approx(values.mean()), n)
        assert (ends_of(found) is None) is (n < 5)
        assert (found["low"] is None) is (found["high"] is None) is (n < 5)


def test_an_interval_that_an_older_version_wrote_of_too_few_prompts_is_not_shown() -> None:
    old = {"mean": 32.553, "low": 32.553, "high": 32.553, "n": 1}
    assert ends_of(old) is None
    assert spread(old) == "32.553 (n = 1, too few for an interval)"
    row = row_of(1, {"reward": old}, {}, None)
    assert (row["reward"], row["reward_n"]) == (32.553, 1) and "reward_low" not in row
    column = columns_for([row])[1]
    assert (column.title, cell(column, row)) == ("reward (n=1)", "32.553")
    assert next(measures({"reward": old})).interval == "none, n = 1"


def test_kl_is_reported_per_completion_and_per_token() -> None:
    table = pa.table(
        {
            "prompt_id": ["a", "a", "b"],
            "log_prob": [-1.0, -2.0, -3.0],
            "log_prob_start": [-3.0, -4.0, -4.0],
            "completion_ids": [[1, 2, 3, 4], [1, 2], [1, 2, 3, 4]],
        }
    )
    found = KLMetrics()(table)
    assert (found["kl"]["mean"], found["kl_per_token"]["mean"]) == (1.5, 0.5)
