"""Each alarm fires where it should, is silent where nothing is odd, and names samples by its rule.

The rules are deterministic; where data are generated, the seeds are fixed, and the rates that a test allows are stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raftune.config import GuardsConfig
from raftune.evaluation import alarms
from raftune.evaluation.alarms import Alarm, RoundData, RoundMonitor
from raftune.protocols import MonitorInput

P, K = 48, 4
WORDS = [
    f"{a}{b}" for a in ("ba", "di", "ko", "lu", "me", "no", "pi", "ra") for b in ("k", "l", "m", "n", "r", "s", "t")
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def evaluated(trained: Any, held_out: Any, round_: int = 1, log_ratio: Any = None) -> pa.Table:
    """Held-out samples from (P, K) arrays."""
    names = [f"{i:03d}-0" for i in range(len(trained))]
    columns = {
        "sample_id": [f"{round_:04d}e/{name}/{k:03d}" for name in names for k in range(K)],
        "prompt_id": np.repeat(names, K),
        "k": pa.array(np.tile(np.arange(K), len(names)), pa.int32()),
        "score": np.ravel(trained),
        "held_out": np.ravel(held_out),
    }
    return pa.table(columns | ({} if log_ratio is None else {"log_ratio": np.ravel(log_ratio)}))


def generated(texts: Sequence[Sequence[str]], scores: Any = None, *, best: int = 0, **parts: Any) -> pa.Table:
    """A round's samples from (P, K) texts, of which the one with index `best` was kept; the control is the first."""
    names = [f"{i:03d}-0" for i in range(len(texts))]
    k = len(texts[0])
    flat = [text for group in texts for text in group]
    place = np.tile(np.arange(k), len(names))
    columns = {
        "sample_id": [f"0001/{name}/{j:03d}" for name in names for j in range(k)],
        "prompt_id": np.repeat(names, k),
        "k": pa.array(place, pa.int32()),
        "source": ["policy"] * len(flat),
        "score": place.astype(np.float64) if scores is None else np.ravel(scores),
        "weight": (place == best).astype(np.float64),
        "length": np.array([len(text.split()) for text in flat], np.float64),
        "clipped": pa.array([False] * len(flat)),
        "similarity": np.zeros(len(flat)),
        "control": pa.array(place == 0),
        "text": flat,
    }
    return pa.table(columns | {f"rewards/{name}": np.ravel(value) for name, value in parts.items()})


def sentences(generator: np.random.Generator, prompts: int, k: int, words: int = 12) -> list[list[str]]:
    return [[" ".join(generator.choice(WORDS, words)) for _ in range(k)] for _ in range(prompts)]


def look(samples: pa.Table, first: dict[str, Any] | None = None, **limits: Any) -> list[dict[str, Any]]:
    """The alarms of a round without held-out samples."""
    factors = {name.removeprefix("rewards/"): 1.0 for name in samples.column_names if name.startswith("rewards/")}
    evidence = MonitorInput(
        round=1, samples=samples, factors=factors, held_out=None, earlier=[], judge="the held-out reward", first=first
    )
    examination = RoundMonitor(GuardsConfig(**limits))
    return examination.alarms(evidence, examination.measures(evidence))


def data(
    samples: pa.Table | None = None,
    factors: dict[str, float] | None = None,
    held_out: pa.Table | None = None,
    earlier: Sequence[pa.Table | None] = (),
    judge: str = "the held-out judge",
    round_: int = 1,
    losses: Sequence[float] = (),
    **limits: Any,
) -> RoundData:
    """What an alarm reads, of a round of which this is known."""
    inputs = MonitorInput(round_, samples, factors or {}, held_out, list(earlier), judge, None, losses)
    return RoundData(GuardsConfig(**limits), inputs, {})


def names(found: list[dict[str, Any]]) -> list[str]:
    return [alarm["alarm"] for alarm in found]


# -- the held-out reward ----------------------------------------------------------------------------------------------


def divergence(fall: float, rise: float = 1.0, noise: float = 1.0, seed: int = 0) -> Alarm | None:
    """The alarm over a start and a round after it, whose rewards differ by so much."""
    generator = rng(seed)
    tables = []
    for round_ in (0, 1):
        trained, held_out = (generator.normal(0, noise, (P, K)) for _ in range(2))
        tables.append(evaluated(trained + rise * round_, held_out - fall * round_, round_))
    return alarms.held_out_falls(data(held_out=tables[1], earlier=tables[:1], false_alarms=0.01))


def test_a_held_out_reward_that_falls_while_the_trained_one_rises_is_an_alarm() -> None:
    found = divergence(fall=1.0)
    assert found is not None
    assert found.numbers["since"] == 0
    assert found.numbers["held_out"]["high"] < 0 < found.numbers["trained"]["low"]
    assert "since the start, on the same 48 held-out prompts and seeds" in found.evidence


@pytest.mark.parametrize(("fall", "rise"), [(-1.0, 1.0), (1.0, -1.0), (0.0, 1.0), (1.0, 0.0)])
def test_rewards_that_go_together_or_stand_are_none(fall: float, rise: float) -> None:
    assert divergence(fall, rise) is None


def test_the_round_before_the_fall_is_the_one_that_is_compared_with() -> None:
    generator = rng(1)
    heights = [(0.0, 0.0), (1.0, 2.0), (2.0, 1.0)]
    tables = [evaluated(a + generator.normal(0, 1, (P, K)), b + generator.normal(0, 1, (P, K))) for a, b in heights]
    found = alarms.held_out_falls(data(held_out=tables[2], earlier=tables[:2], false_alarms=0.01))
    assert found is not None
    assert found.numbers["since"] == 1  # against the start, both rewards rose


def test_a_slow_fall_that_no_single_round_shows_is_seen_in_time() -> None:
    """0.2 a round with a standard error of 0.10: from round 8 on it is 10 standard errors since the start."""
    generator = rng(2)
    tables = [evaluated(generator.normal(0.5 * r, 1, (P, K)), generator.normal(-0.2 * r, 1, (P, K))) for r in range(9)]
    assert alarms.held_out_falls(data(held_out=tables[1], earlier=tables[:1], judge="it", false_alarms=1e-6)) is None
    found = alarms.held_out_falls(data(held_out=tables[8], earlier=tables[:8], judge="it", false_alarms=1e-6))
    assert found is not None


def test_named_are_completions_that_the_trained_reward_likes_and_the_judge_does_not() -> None:
    generator = rng(3)
    trained, held_out = generator.normal(1, 1, (P, K)), generator.normal(-1, 1, (P, K))
    now, then = evaluated(trained, held_out), evaluated(trained - 1, held_out + 1, 0)
    found = alarms.held_out_falls(data(held_out=now, earlier=[then], false_alarms=0.01))
    assert found is not None
    row = {name: i for i, name in enumerate(now.column("sample_id").to_pylist())}
    liked = [float(np.ravel(trained)[row[name]]) for name, _ in found.samples]
    scores = [float(np.ravel(held_out)[row[name]]) for name, _ in found.samples]
    assert len({name.split("/")[1] for name, _ in found.samples}) == alarms.SHOWN
    assert min(liked) >= np.quantile(trained, alarms.LIKED)
    assert scores == sorted(scores)
    assert scores[0] == np.min(held_out[trained >= np.quantile(trained, alarms.LIKED)])
    assert "at the start, same seed" in found.samples[0][1]


def test_prompts_that_only_one_round_has_are_left_out() -> None:
    now, then = evaluated(np.ones((P, K)), np.zeros((P, K))), evaluated(np.zeros((P - 8, K)), np.ones((P - 8, K)), 0)
    found = alarms.held_out_falls(data(held_out=now, earlier=[then], judge="it", false_alarms=0.01))
    assert found is not None
    assert found.numbers["trained"]["n"] == P - 8


@pytest.mark.slow
def test_without_a_change_of_the_judge_alarms_are_rarer_than_the_chosen_chance() -> None:
    """600 runs of five rounds in which the trained reward rises and the held-out one does nothing, 16 prompts.

    The rule claims a rate of at most 0.05 for the last round; at that rate more than 60 of 600 would come with a
    probability below 1e-6.
    """
    fired, runs, rounds = 0, 600, 5
    generator = rng(4)
    for _ in range(runs):
        hardness = generator.normal(0, 2, (16, 1))
        tables = [
            evaluated(generator.normal(r, 0.1, (16, K)), hardness + generator.exponential(1, (16, K)))
            for r in range(rounds + 1)
        ]
        fired += alarms.held_out_falls(data(held_out=tables[-1], earlier=tables[:-1], false_alarms=0.05)) is not None
    assert fired <= 60


def test_p_of_zero_differences_is_one_and_more_rounds_than_flips_can_still_be_tested() -> None:
    assert alarms.by_chance(np.zeros(20)) == 1.0
    assert alarms.by_chance(np.full(100, -1.0)) < 1e-15


@pytest.mark.parametrize(
    ("chance", "words"),
    [
        (0.009, "at most 1 round in 110"),
        (1 / 12_399, "at most 1 round in 12,000"),
        (1e-9, "less than 1 round in a million"),
    ],
)
def test_a_chance_never_sounds_smaller_than_it_is(chance: float, words: str) -> None:
    assert alarms.odds(chance) == words


# -- what was kept ----------------------------------------------------------------------------------------------------


def test_a_healthy_round_raises_nothing() -> None:
    """Twenty rounds of different answers, scored by two rewards of one size: not one alarm of any kind."""
    for seed in range(20):
        generator = rng(seed)
        parts = {name: generator.normal(0, 1, (32, K)) for name in ("polite", "useful")}
        samples = generated(sentences(generator, 32, K), sum(parts.values()), **parts)
        assert look(samples) == []


def test_kept_completions_that_all_sound_alike_are_less_varied_and_nearly_the_same() -> None:
    generator = rng(5)
    texts = sentences(generator, 32, K)
    for group in texts:
        group[1] = "please " * 9 + group[1].split()[0]
    found = look(generated(texts, best=1))
    assert names(found)[0] == "diversity_drops"
    first = found[0]
    assert first["numbers"]["lost"] > 0.5
    assert len({item["sample_id"].split("/")[1] for item in first["samples"]}) == alarms.SHOWN
    assert all(item["sample_id"].endswith("/001") for item in first["samples"])


def test_what_was_lost_over_the_rounds_is_measured_against_round_1() -> None:
    generator = rng(6)
    varied = generated(sentences(generator, 32, K))
    few = [" ".join(generator.choice(WORDS[:4], 12)) for _ in range(32 * K)]
    uniform = generated([few[i * K : i * K + K] for i in range(32)])
    examination = RoundMonitor(GuardsConfig())
    first = examination.measures(MonitorInput(1, varied, {}, None, [], "", None))["generated"]
    assert look(uniform) == []  # it draws what it keeps: of this round alone nothing can be said
    found = look(uniform, first)
    assert "diversity_drops" in names(found)
    assert "round 1" in found[0]["evidence"]


def test_sets_of_unlike_sizes_are_not_compared() -> None:
    """Distinct-2 falls as a set grows, so that round 1's of a hundredth of the words says nothing."""
    generator = rng(7)
    small = generated(sentences(generator, 32, K, words=4))
    large = generated(sentences(generator, 32, K, words=400))
    examination = RoundMonitor(GuardsConfig(length_factor=1000))
    first = examination.measures(MonitorInput(1, small, {}, None, [], "", None))["generated"]
    assert (
        first["distinct_2"]
        > 2 * examination.measures(MonitorInput(2, large, {}, None, [], "", None))["generated"]["distinct_2"]
    )
    assert look(large, first, length_factor=1000) == []


@pytest.mark.parametrize(("words", "title"), [(40, "longer"), (5, "shorter")])
def test_kept_completions_of_another_length_than_generated_are_a_drift(words: int, title: str) -> None:
    generator = rng(8)
    texts = sentences(generator, 32, 16)
    for group, odd in zip(texts, sentences(generator, 32, 1, words), strict=True):
        group[3] = odd[0]
    found = [alarm for alarm in look(generated(texts, best=3)) if alarm["alarm"] == "length_drifts"]
    assert len(found) == 1
    assert title in found[0]["title"]
    assert found[0]["numbers"]["selected"]["mean"] == words
    assert found[0]["samples"][0]["why"] == f"length {words}"


def test_a_drift_that_the_interval_does_not_show_is_none() -> None:
    """Of 32 kept answers two are very long: the mean is beyond twice that of the samples, its interval is not."""
    generator = rng(9)
    texts = sentences(generator, 32, 16)
    for group in texts[:2]:
        group[3] = " ".join(generator.choice(WORDS, 400))
    samples = generated(texts, best=3)
    kept = samples.filter(samples.column("weight").to_numpy() > 0)
    assert np.mean(kept.column("length").to_numpy()) > 2 * np.mean(samples.column("length").to_numpy())
    assert look(samples) == []


def test_one_completion_for_many_prompts_names_its_prompts() -> None:
    generator = rng(10)
    texts = sentences(generator, 32, K)
    for group in texts[:20]:
        group[1] = "it is always a pleasure to help you with anything at all"
    found = look(generated(texts, best=1))[-1]
    assert found["alarm"] == "near_duplicates"
    assert found["numbers"] == {"selected": 20 / 32, "first": 0.0, "clusters": [20]}
    assert found["samples"][0]["why"] == "nearly the same as completions kept for 19 other prompts"


def test_completions_that_are_alike_from_the_beginning_are_no_alarm() -> None:
    generator = rng(11)
    letters = [[str(generator.choice(["A", "B", "C", "D"])) for _ in range(K)] for _ in range(32)]
    assert look(generated(letters)) == []


def test_a_round_with_few_kept_completions_is_too_small_to_judge() -> None:
    texts = [["please please please please"] * K for _ in range(alarms.FEWEST - 1)]
    first = {"distinct_2": 1.0, "words": 60, "length": 60.0, "near_duplicates": 0.0}
    assert look(generated(texts), first) == []


# -- the parts of the score -------------------------------------------------------------------------------------------


def scored(loud: float, quiet: float, seed: int = 12) -> pa.Table:
    generator = rng(seed)
    parts = {"loud": generator.normal(0, loud, (32, K)), "quiet": generator.normal(0, quiet, (32, K))}
    score = parts["loud"] + parts["quiet"]
    samples = generated(sentences(generator, 32, K), score, **parts)
    best = (score == score.max(axis=1, keepdims=True)).astype(np.float64)
    return samples.set_column(samples.column_names.index("weight"), "weight", pa.array(best.ravel()))


def test_a_part_that_decides_nearly_alone_is_named_with_its_share() -> None:
    found = look(scored(loud=10.0, quiet=1.0))
    assert names(found) == ["part_dominates"]
    assert found[0]["numbers"]["part"] == "loud"
    assert found[0]["numbers"]["shares"]["loud"] == pytest.approx(1 - found[0]["numbers"]["shares"]["quiet"])
    assert found[0]["numbers"]["same_best"] >= 28
    assert "others -" in found[0]["samples"][0]["why"]


def test_parts_of_one_size_decide_together() -> None:
    assert look(scored(loud=1.0, quiet=1.0)) == []


def test_a_part_that_all_samples_satisfy_leaves_the_other_to_decide() -> None:
    assert look(scored(loud=1.0, quiet=0.0)) == []


def test_a_part_without_weight_does_not_take_part() -> None:
    samples = scored(loud=10.0, quiet=1.0)
    assert alarms.part_dominates(data(samples, {"loud": 1.0, "quiet": 0.0})) is None


def test_samples_without_a_score_do_not_take_part() -> None:
    samples = scored(loud=10.0, quiet=1.0)
    score = samples.column("score").to_numpy().copy()
    score[5] = np.nan
    holed = samples.set_column(samples.column_names.index("score"), "score", pa.array(score, from_pandas=True))
    found = alarms.part_dominates(data(holed, {"loud": 1.0, "quiet": 1.0}))
    assert found is not None


# -- the start --------------------------------------------------------------------------------------------------------


def test_a_policy_beyond_its_budget_names_the_completions_that_are_farthest_from_the_start() -> None:
    ratio = np.arange(P * K, dtype=float).reshape(P, K)
    held_out = evaluated(np.zeros((P, K)), np.zeros((P, K)), log_ratio=ratio)
    found = alarms.kl_beyond_budget(data(held_out=held_out, max_kl=50.0))
    assert found is not None
    assert found.numbers["kl"]["mean"] == ratio.mean()
    assert found.samples[0] == (f"0001e/{P - 1:03d}-0/003", f"log p - log p0 is {P * K - 1:.1f} nats")


def test_a_policy_within_its_budget_is_none() -> None:
    ratio = np.ones((P, K))
    assert alarms.kl_beyond_budget(data(held_out=evaluated(ratio, ratio, log_ratio=ratio), max_kl=1.0)) is None


# -- measures ---------------------------------------------------------------------------------------------------------


def test_kept_samples_count_by_their_weight_and_both_sets_of_words_are_of_one_size() -> None:
    generator = rng(13)
    scores = np.tile([0.0, 1.0, 2.0, 3.0], (20, 1))
    samples = generated(sentences(generator, 20, K), scores, best=3, value=scores)
    found = RoundMonitor(GuardsConfig()).measures(MonitorInput(1, samples, {"value": 1.0}, None, [], "", None))
    assert (found["generated"]["samples"], found["selected"]["samples"]) == (80, 20)
    assert (found["generated"]["reward"], found["selected"]["rewards/value"]) == (1.5, 3.0)
    assert found["generated"]["words"] == found["selected"]["words"] == 20 * 12
    halves = samples.set_column(
        samples.column_names.index("weight"), "weight", pa.array(np.tile([0, 0, 0.25, 0.75], 20))
    )
    found = RoundMonitor(GuardsConfig()).measures(MonitorInput(1, halves, {"value": 1.0}, None, [], "", None))
    assert found["selected"]["reward"] == 2.75


def test_a_round_that_kept_nothing_is_measured_without_words() -> None:
    samples = generated(sentences(rng(14), 20, K), best=9)
    found = RoundMonitor(GuardsConfig()).measures(MonitorInput(1, samples, {}, None, [], "", None))
    assert found["selected"] == {"samples": 0, "words": 0}
    assert look(samples) == []


# -- answers that teach nothing, and a fit that goes astray ------------------------------------------------------------


def tried(completions: Sequence[str], scores: Sequence[float | None] | None = None, finish: str = "eos") -> pa.Table:
    """Samples as `plan` draws them, of prompts with four answers each."""
    n = len(completions)
    return pa.table(
        {
            "sample_id": [f"probe/{i // 4}/{i % 4}" for i in range(n)],
            "prompt_id": [str(i // 4) for i in range(n)],
            "completion": list(completions),
            "finish": [finish] * n,
            "score": pa.array(list(range(n)) if scores is None else scores, pa.float64()),
        }
    )


def test_what_is_tried_raises_what_a_round_of_it_would() -> None:
    words = ["one", "two", "three", "four"]
    assert alarms.probe_alarms(tried(words * 2), GuardsConfig()) == []
    found = alarms.probe_alarms(tried(["", " \n", "three", "four"] * 2), GuardsConfig())
    assert [(alarm["alarm"], alarm["numbers"]) for alarm in found] == [("empty_answers", {"tried": 0.5})]
    assert [sample["sample_id"] for sample in found[0]["samples"]] == ["probe/0/0", "probe/1/0"]
    assert names(alarms.probe_alarms(tried(words, finish="length"), GuardsConfig())) == ["cut_off"]
    assert names(alarms.probe_alarms(tried(["same"] * 8), GuardsConfig())) == ["identical_candidates"]
    assert names(alarms.probe_alarms(tried(["same"] * 8, finish="length"), GuardsConfig(cut_off_share=1.0))) == [
        "identical_candidates"
    ]
    found = alarms.probe_alarms(tried(words * 2, [0, 0, None, 0, 1, 1, 1, 1]), GuardsConfig())
    assert [(alarm["alarm"], alarm["numbers"]["tied"]) for alarm in found] == [("equal_scores", 2)]
    assert found[0]["samples"][0]["why"] == "all 3 candidates score 0"


@pytest.mark.parametrize(("share", "raised"), [(0.15, False), (0.25, True)])
def test_empty_completions_are_an_alarm_from_their_share_on(share: float, raised: bool) -> None:
    texts = [[""] * K if i < share * P else group for i, group in enumerate(sentences(rng(), P, K))]
    flags = pa.array([text == "" for group in texts for text in group])
    assert ("empty_answers" in names(look(generated(texts).append_column("empty", flags)))) is raised


def test_kept_completions_that_were_cut_off_are_an_alarm_though_few_that_were_generated_are() -> None:
    samples = generated(sentences(rng(), P, K), best=0)
    cut = pa.array([i % K == 0 for i in range(P * K)])
    samples = samples.set_column(samples.column_names.index("clipped"), "clipped", cut)
    found = {alarm["alarm"]: alarm for alarm in look(samples)}
    assert found["cut_off"]["numbers"] == {"generated": 1 / K, "kept": 1.0}
    assert look(samples, cut_off_share=1.0) == []


def test_prompts_with_equal_scores_are_an_alarm_from_their_share_on() -> None:
    scores = np.tile(np.arange(K), (P, 1)).astype(float)
    scores[: P // 2] = 0.0
    assert names(look(generated(sentences(rng(), P, K), scores))) == []
    scores[P // 2] = 1.0
    found = look(generated(sentences(rng(), P, K), scores))
    assert names(found) == ["equal_scores"]
    assert (found[0]["numbers"]["tied"], found[0]["numbers"]["prompts"]) == (P // 2 + 1, P)


def test_one_candidate_a_prompt_is_no_alarm_for_there_was_nothing_to_rank_by_design() -> None:
    assert look(generated(sentences(rng(), P, 1), np.zeros((P, 1)))) == []


def test_a_policy_that_says_one_thing_is_an_alarm_by_its_held_out_completions() -> None:
    samples = generated(sentences(rng(), P, K))
    held_out = evaluated(np.zeros((P, K)), np.zeros((P, K))).drop_columns("held_out")
    held_out = held_out.append_column("content", pa.array(np.repeat(np.arange(P), K)))
    evidence = MonitorInput(1, samples, {}, held_out, [], "", None)
    examination = RoundMonitor(GuardsConfig())
    found = examination.alarms(evidence, examination.measures(evidence))
    assert [(alarm["alarm"], alarm["numbers"]) for alarm in found] == [("identical_candidates", {"held_out": 1.0})]


def test_a_loss_that_doubles_is_an_alarm_by_its_first_and_last_tenth() -> None:
    assert alarms.loss_diverges(data(losses=[1.0, 5.0] * 50)) is None
    assert alarms.loss_diverges(data(losses=[2.0] * 10 + [1.0] * 80 + [4.5] * 10)).numbers == {  # type: ignore[union-attr]
        "first": 2.0,
        "last": 4.5,
        "steps": 100,
    }
    assert alarms.loss_diverges(data(losses=[1.0, 9.0])) is None
    assert alarms.loss_diverges(data(losses=[])) is None


@pytest.mark.parametrize(
    ("nats", "tokens", "rounds", "raised"),
    [(259.0, 64, 1, True), (5.0, 30, 8, False), (2.0, 1, 1, False), (40.0, 200, 1, False), (8.5, 8, 4, True)],
)
def test_without_a_budget_a_kl_is_an_alarm_beyond_what_selection_teaches_and_a_nat_a_token(
    nats: float, tokens: int, rounds: int, raised: bool
) -> None:
    ratio = np.full((P, K), nats)
    held_out = evaluated(ratio, ratio, log_ratio=ratio).append_column("length", pa.array([float(tokens)] * (P * K)))
    samples = pa.table({"prompt_id": np.repeat(np.arange(P), 8)})
    assert (alarms.kl_beyond_budget(data(samples, held_out=held_out, round_=rounds)) is not None) is raised
