"""Runs whose scores are combined by rank or by thresholds, and rewards that cannot read what a policy makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raftune.analysis.whatif import rescore, reselect
from raftune.config.rewards import RewardsConfig
from raftune.errors import ConfigChanged, ConfigError
from raftune.rewards.combining import numbered, ranks
from raftune.runtime.run import run, verify
from raftune.training.devices import devices
from tests.builders import tiny_clip
from tests.runs import image_family, tiny

BRIGHT = {"spec": "colour", "name": "bright"}
SMALL = {"spec": "file_size", "name": "small", "weight": -1.0, "options": {"format": "png"}}
RANKED = {"rewards": {"reward_funcs": [BRIGHT, SMALL], "combine": "rank"}, "evaluation": {"best_by": "bright"}}


def image_config(root: Path, **changes: Any) -> Any:
    return image_family.config(root, **changes)


def without_rewards() -> Any:
    found = image_family.objects()
    return type(found)(train=found.train, held_out=found.held_out)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranked") / "run"
    run(image_config(root, **RANKED), without_rewards())
    return root


def table(root: Path, stage: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((root / stage).glob("chunk-*.parquet")))


def by_rank(scores: pa.Table) -> np.ndarray[Any, Any]:
    groups = numbered(scores.column("prompt_id").to_pylist())
    bright, small = (ranks(scores.column(f"rewards/{name}").to_numpy(), groups) for name in ("bright", "small"))
    return np.asarray(bright - small)


# -- by rank -----------------------------------------------------------------------------------------------------------


def test_scores_are_ranks_within_the_prompt_and_the_parts_stay_as_they_were(ranked: Path) -> None:
    scores = table(ranked / "round-0001", "score")
    np.testing.assert_allclose(scores.column("score").to_numpy(), by_rank(scores))
    assert (
        scores.column("rewards/bright").to_numpy().max() <= 1 < 1000 * scores.column("rewards/small").to_numpy().min()
    )


def test_the_best_by_rank_is_kept(ranked: Path) -> None:
    verdicts = pq.read_table(ranked / "round-0001/select/verdicts.parquet").to_pandas()
    kept = verdicts[verdicts.weight > 0].set_index("prompt_id").score.to_dict()
    assert kept == verdicts.groupby("prompt_id").score.max().to_dict()


def test_evaluations_take_the_sum_so_that_rounds_can_be_compared(ranked: Path) -> None:
    scores = table(ranked / "round-0002/evaluate", "score").to_pandas()
    np.testing.assert_allclose(scores.score, scores["rewards/bright"] - scores["rewards/small"])
    best = json.loads((ranked / "best.json").read_text())
    means = [
        json.loads((ranked / f"round-000{i}/evaluate/metrics.json").read_text())["rewards/bright/mean"]["mean"]
        for i in range(3)
    ]
    assert (best["by"], best["round"]) == ("bright", int(np.argmax(means)))
    assert verify(ranked) == []


def test_no_round_can_be_chosen_by_a_rank(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best_by must name one reward where rewards\.combine is rank; got 'reward'"):
        image_config(tmp_path, rewards={"combine": "rank"})
    for fine in ({"evaluation": {"num_prompts": 0}}, {"num_rounds": 0}, {"evaluation": {"best_by": "held_out"}}):
        image_config(tmp_path, rewards={"combine": "rank"}, **fine)


def test_another_way_of_combining_makes_the_scores_stale_and_no_evaluation(tmp_path: Path) -> None:
    summed = {**RANKED, "rewards": {**RANKED["rewards"], "combine": "sum"}, "num_rounds": 1}
    run(image_config(tmp_path / "run", **summed), without_rewards())
    evaluated = (tmp_path / "run/round-0000/evaluate/score/_COMMIT.json").read_bytes()
    with pytest.raises(ConfigChanged, match=r"score of round 1 .* the rewards have changed .*--from 1/score"):
        run(image_config(tmp_path / "run", **RANKED, num_rounds=1), without_rewards())
    run(image_config(tmp_path / "run", **RANKED, num_rounds=1), without_rewards(), redo="score")
    assert (tmp_path / "run/round-0000/evaluate/score/_COMMIT.json").read_bytes() == evaluated
    scores = table(tmp_path / "run/round-0001", "score")
    np.testing.assert_allclose(scores.column("score").to_numpy(), by_rank(scores))


def test_a_run_can_be_rescored_by_rank_and_says_how_to_redo_it(tmp_path: Path) -> None:
    summed = {**RANKED, "rewards": {**RANKED["rewards"], "combine": "sum"}, "num_rounds": 1}
    run(image_config(tmp_path / "run", **summed), without_rewards())
    flags = {"rewards.reward_funcs": RANKED["rewards"]["reward_funcs"], "rewards.combine": "rank"}
    found = rescore(tmp_path / "run", flags, name="ranked")
    assert list(found.changes) == ["rewards.combine"]
    assert found.redo.endswith("--rewards.combine rank --from score")
    scores = table(tmp_path / "run/whatif/ranked/round-0001", "score")
    np.testing.assert_allclose(scores.column("score").to_numpy(), by_rank(scores))


def test_ranks_among_four_say_nothing_of_ranks_among_two(ranked: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_generations must be 4 where rewards\.combine is rank; got 2"):
        reselect(ranked, {"sampling.num_generations": 2}, dry_run=True)
    assert reselect(ranked, {"selection.rule": "top_m", "selection.m": 2}, dry_run=True).rounds == [1, 2]


def test_no_part_of_a_score_by_rank_dominates_by_its_scale(tmp_path: Path) -> None:
    """One reward a thousand times as large as the other: an alarm under the sum, none under ranks."""
    rewards = {"reward_funcs": [{**BRIGHT, "weight": 1000.0}, {**SMALL, "weight": -0.001}]}
    told = {}
    for how in ("sum", "rank"):
        given = [{**one, "weight": one["weight"] if how == "sum" else 1.0} for one in rewards["reward_funcs"]]
        settings = {"rewards": {"reward_funcs": given, "combine": how}, "evaluation": {"best_by": "bright"}}
        run(image_config(tmp_path / how, num_rounds=1, **settings), without_rewards())
        alarms = json.loads((tmp_path / how / "round-0001/guard/alarms.json").read_text())
        told[how] = any(alarm["alarm"] == "part_dominates" for alarm in alarms)
    assert told == {"sum": True, "rank": False}


# -- thresholds --------------------------------------------------------------------------------------------------------


def test_a_threshold_counts_its_weight_and_the_ledger_keeps_the_value(tmp_path: Path) -> None:
    specs = [{**BRIGHT, "weight": 5.0, "at_least": 0.4, "at_most": 0.6}, SMALL]
    run(image_config(tmp_path / "run", num_rounds=1, rewards={"reward_funcs": specs}), without_rewards())
    for stage in ("score", "evaluate/score"):
        scores = table(tmp_path / "run/round-0001", stage).to_pandas()
        bright = scores["rewards/bright"]
        inside = (bright >= 0.4) & (bright <= 0.6)
        assert 0 < inside.sum() < len(inside)
        np.testing.assert_allclose(scores.score, 5.0 * inside - scores["rewards/small"])


# -- rewards and what the policy makes ---------------------------------------------------------------------------------


def test_a_reward_of_texts_is_refused_for_images_before_generation(tmp_path: Path) -> None:
    message = (
        r"rewards\.reward_funcs: length scores texts, and policy\.family: "
        r"tests\.runs\.image_family:SketchFamily makes images"
    )
    length = {"spec": "length", "options": {"target": 3}}
    with pytest.raises(ConfigError, match=message):
        run(image_config(tmp_path / "run", rewards={"reward_funcs": [BRIGHT, length]}), without_rewards())
    with pytest.raises(ConfigError, match=message.replace("rewards", "evaluation", 1)):
        run(image_config(tmp_path / "run", evaluation={"reward_funcs": [length]}), image_family.objects())
    assert not list((tmp_path / "run").glob("round-*"))


def test_a_reward_of_images_is_refused_for_texts_before_generation(tmp_path: Path) -> None:
    message = (
        r"rewards\.reward_funcs: bright scores images, and policy\.family: tabular makes texts\. Name a reward for"
    )
    with pytest.raises(ConfigError, match=message):
        run(tiny.config(tmp_path / "run", rewards={"reward_funcs": [BRIGHT]}), tiny.objects())
    assert not list((tmp_path / "run").glob("round-*"))
    run(tiny.config(tmp_path / "run", num_rounds=1), tiny.objects())
    with pytest.raises(ConfigError, match=message):
        rescore(tmp_path / "run", {"rewards.reward_funcs": [BRIGHT]})


def test_a_device_that_is_not_there_is_refused_before_generation(tmp_path: Path) -> None:
    if "cuda:0" in devices():
        pytest.skip("this machine has a GPU")
    clip = tiny_clip(tmp_path / "clip")
    rewards = {"reward_funcs": [str(clip)], "device": "cuda"}
    with pytest.raises(
        ConfigError, match=r"rewards\.device must be a device of this machine; got 'cuda', and there is"
    ):
        run(image_config(tmp_path / "run", rewards=rewards), without_rewards())
    assert not list((tmp_path / "run").glob("round-*"))


def test_captions_that_the_reward_reads_in_part_are_reported_with_their_number(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "clip")  # reads 16 tokens; every caption here has more
    told: list[str] = []

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "chunk" and facts["stage"] == "score":
            told.extend(facts["notes"])

    run(
        image_config(tmp_path / "run", num_rounds=1, rewards=RewardsConfig(reward_funcs=(str(clip),)).model_dump()),
        without_rewards(),
        observe=observe,
    )
    assert len(told) == 2  # two units of four prompts, no prompt told of twice
    assert all(note.startswith("clip: 4 of 4 prompts are longer than the 16 tokens") for note in told)
