"""Deciding again over what a run generated: the run's own settings give its own bytes, others what a redo would
give.
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from raftune.analysis.whatif import WhatIfResult, rescore, reselect
from raftune.cli import main
from raftune.errors import ConfigChanged, ConfigError, RewardError, RunDamaged, RunInUse
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import resume, run, verify
from raftune.store.run import RunFolder
from tests.builders import save_tiny
from tests.runs import tiny
from tests.runs.kill import difference, tree

REWARDS = """
def value(prompts, completions, **columns):
    return [float(answer) for answer in completions]

def other(prompts, completions, **columns):
    return [float((answer * 3 + prompt) % 5) for prompt, answer in zip(prompts, completions)]

def letters(prompts, completions, **columns):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]

def sign(prompts, completions, **columns):
    return [float(prompt - answer) for prompt, answer in zip(prompts, completions)]

def broken(prompts, completions, **columns):
    raise ValueError("no luck")

def needs_topic(prompts, completions, topic, **columns):
    return [0.0 for _ in completions]
"""
Copy = Callable[[str], Path]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, rewards: Path) -> dict[str, Path]:
    """`plain`: tabular, scored by a function of a file. `objects`: every stage there is, scored by a Python object.
    `text`: a small Llama."""
    base = tmp_path_factory.mktemp("finished")
    roots = {name: base / name for name in ("plain", "objects", "text")}
    run(plain(roots["plain"], rewards), without_rewards())
    run(tiny.config(roots["objects"], **tiny.EVERYTHING), tiny.objects())
    text(roots["text"], save_tiny(base / "llama"), rewards)
    return roots


@pytest.fixture
def copy(finished: dict[str, Path], tmp_path: Path) -> Copy:
    return lambda name: Path(shutil.copytree(finished[name], tmp_path / name))


def plain(root: Path, rewards: Path, name: str = "value", **changes: Any) -> Any:
    return tiny.config(root, rewards={"reward_funcs": [f"{rewards}:{name}"]}, **changes)


def without_rewards() -> PythonObjects:
    return PythonObjects(train=tiny.train, held_out=tiny.held_out)


def text(root: Path, model: Path, rewards: Path) -> None:
    prompts = root.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in "abcdefghijkl"))
    config = {
        "output_dir": str(root),
        "num_rounds": 2,
        "prompts_per_round": 6,
        "data": {"prompts": str(prompts)},
        "policy": {"model": str(model)},
        "sampling": {"num_generations": 4, "chunk_size": 3, "max_completion_length": 8},
        "rewards": {"reward_funcs": [f"{rewards}:letters"]},
        "selection": {"drop_duplicates": True, "min_length": 1},
        "evaluation": {"num_prompts": 2, "num_generations": 2},
        "engine": {"threads": 1},
    }
    run(config)


def file(rewards: Path, name: str) -> dict[str, Any]:
    """The flag that names a function of the file."""
    return {"rewards.reward_funcs": [f"{rewards}:{name}"]}


def part(root: Path, name: str) -> dict[str, str]:
    """The hashes of one stage's files, by round and file."""
    return {path: value for path, value in tree(root).items() if path.split("/")[1:2] == [name]}


def kept(root: Path, round_: int) -> dict[str, float]:
    rows = pq.read_table(root / f"round-{round_:04d}/select/verdicts.parquet").to_pylist()
    return {row["sample_id"]: row["weight"] for row in rows if row["weight"] > 0}


# -- the run's own settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "objects", "text"])
def test_selecting_by_the_runs_own_settings_gives_its_verdicts_bit_for_bit(copy: Copy, name: str) -> None:
    root = copy(name)
    found = reselect(root, {}, name="same")
    assert part(root / "whatif/same", "select") == part(root, "select") != {}
    change = found.difference.all
    assert (change.changed, change.only_before, change.only_now) == (0, 0, 0)
    assert found.redo == ""


@pytest.mark.parametrize(("name", "function"), [("plain", "value"), ("text", "letters")])
def test_rescoring_by_the_runs_own_reward_gives_its_scores_and_its_verdicts_bit_for_bit(
    copy: Copy, rewards: Path, name: str, function: str
) -> None:
    root = copy(name)
    found = rescore(root, file(rewards, function))
    for stage in ("score", "select"):
        assert part(root / "whatif" / function, stage) == part(root, stage) != {}
    assert found.difference.all.changed == 0
    assert found.redo == ""


def test_rescoring_reaches_the_completions_of_teachers_and_columns_too(copy: Copy, rewards: Path) -> None:
    root = copy("objects")
    found = rescore(root, file(rewards, "value"))  # the same values as the object that scored the run
    for round_ in (1, 2):
        assert kept(root / "whatif/value", round_) == kept(root, round_)
    sources = {row["source"] for path in (root / "whatif").rglob("chunk-*") for row in pq.read_table(path).to_pylist()}
    assert sources == {"policy", "column:human", "teacher"}
    assert found.difference.all.changed == 0


# -- what a redo, or another run, would give -------------------------------------------------------------------------


@pytest.mark.slow
def test_rescored_verdicts_are_those_that_redoing_the_round_from_its_scores_gives(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    found = rescore(root, file(rewards, "other"), which="1")
    run(plain(root, rewards, "other"), without_rewards(), redo="0/evaluation-score")
    for stage in ("score", "select"):
        assert part(root / "whatif/other", stage) == {
            path: value for path, value in part(root, stage).items() if path.startswith("round-0001")
        }
    assert found.rounds == [1]
    assert found.redo.endswith(f"--rewards.reward_funcs {rewards}:other --from evaluation-score")


@pytest.mark.slow
def test_another_rule_over_rescored_completions_is_what_redoing_both_gives(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    rescore(root, file(rewards, "other"))
    flags = {"selection.rule": "top_m", "selection.m": 2}
    found = reselect(root, flags, scores="whatif/other", which="1", name="both")
    run(
        plain(root, rewards, "other", selection={"rule": "top_m", "m": 2}), without_rewards(), redo="0/evaluation-score"
    )
    verdicts = "round-0001/select/verdicts.parquet"
    assert (root / "whatif/both" / verdicts).read_bytes() == (root / verdicts).read_bytes()
    assert found.redo.endswith("--selection.m 2 --selection.rule top_m --from evaluation-score")


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["rescore", "select"])
def test_the_command_that_is_given_really_does_so(copy: Copy, rewards: Path, ask: str) -> None:
    root = copy("text")
    spec = [{"spec": "length", "options": {"target": 3}, "weight": 0.5}, {"spec": f"{rewards}:letters"}]
    if ask == "rescore":
        found = rescore(root, {"rewards.reward_funcs": spec, "rewards.batch_size": 2}, name="asked")
    else:
        found = reselect(root, {"selection.rule": "random", "selection.min_length": None}, name="asked")
    words = shlex.split(found.redo.removeprefix("To really do so: "))
    assert words[0] == "raftune"
    assert main(words[1:]) == 0
    verdicts = "round-0001/select/verdicts.parquet"
    assert (root / "whatif/asked" / verdicts).read_bytes() == (root / verdicts).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "text"])
def test_the_first_samples_are_what_a_run_with_a_smaller_k_samples_and_keeps(
    copy: Copy, tmp_path: Path, rewards: Path, name: str
) -> None:
    root = copy(name)
    found = reselect(root, {"sampling.num_generations": 2}, which="1", name="k2")
    fewer = tmp_path / "fewer"
    config = RunFolder(root).read_config()
    config |= {"output_dir": str(fewer), "num_rounds": 1, "sampling": {**config["sampling"], "num_generations": 2}}
    run(config, without_rewards() if name == "plain" else None)
    for file_ in ("verdicts.parquet", "summary.json"):
        where = f"round-0001/select/{file_}"
        assert (root / "whatif/k2" / where).read_bytes() == (fewer / where).read_bytes()
    assert "which generates again" in found.redo
    assert found.redo.endswith("--sampling.num_generations 2 --from plan")


def test_a_smaller_k_leaves_the_completions_of_others_in_the_pool(copy: Copy) -> None:
    root = copy("objects")
    reselect(root, {"sampling.num_generations": 1}, name="k1")
    rows = pq.read_table(root / "whatif/k1/round-0001/select/verdicts.parquet").to_pylist()
    per_prompt = len(rows) / len({row["prompt_id"] for row in rows})
    assert per_prompt == 1 + 1 + 2  # one sample, a human's answer, two of the teacher's
    assert {row["k"] for row in rows if row["source"] == "policy"} == {0}


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_the_table_counts_what_the_two_files_of_verdicts_say(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    found = rescore(root, file(rewards, "other"))
    for change in found.difference.rounds:
        assert change.round is not None
        before, now = kept(root, change.round), kept(root / "whatif/other", change.round)
        assert change.in_both == len(before.keys() & now.keys())
        assert (change.only_before, change.only_now) == (len(before.keys() - now), len(now.keys() - before))
        assert (change.before.samples, change.now.samples) == (len(before), len(now))
        old, new = (scores(where, change.round) for where in (root, root / "whatif/other"))
        for side, chosen in ((change.before, before), (change.now, now)):
            assert side.reward_before == pytest.approx(np.mean([old[name] for name in chosen]))
            assert side.reward_now == pytest.approx(np.mean([new[name] for name in chosen]))
    assert found.difference.all.only_now == sum(change.only_now for change in found.difference.rounds) > 0
    assert found.difference.names == ("value", "other")


def test_the_means_over_all_rounds_weigh_those_below_zero_too(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    found = rescore(root, file(rewards, "sign")).difference
    sides = [(getattr(c, side), side) for c in found.rounds for side in ("before", "now")]
    assert min(kept.reward_now for kept, _ in sides) < 0
    for side in ("before", "now"):
        rounds = [kept for kept, name in sides if name == side]
        for by in ("reward_before", "reward_now"):
            mean = np.average([getattr(kept, by) for kept in rounds], weights=[kept.samples for kept in rounds])
            assert getattr(getattr(found.all, side), by) == pytest.approx(mean)


def test_the_runs_own_rule_over_other_scores_is_stored_beside_these_scores(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    first = rescore(root, file(rewards, "other"))
    again = reselect(root, {}, scores=first.name)
    assert again.name == f"{first.name}-selected" and again.worked
    assert again.difference.all == first.difference.all
    assert not reselect(root, {}, scores=first.name).worked


def scores(root: Path, round_: int) -> dict[str, float]:
    files = sorted((root / f"round-{round_:04d}/score").glob("chunk-*.parquet"))
    return {row["sample_id"]: row["score"] for path in files for row in pq.read_table(path).to_pylist()}


def test_what_k_would_have_given_is_the_mean_over_all_subsets_of_the_samples(copy: Copy) -> None:
    root = copy("plain")
    best = reselect(root, {}, dry_run=True).difference.best_of
    groups: dict[tuple[int, str], list[float]] = {}
    for round_ in (1, 2):
        for name, score in scores(root, round_).items():
            groups.setdefault((round_, name.split("/")[1]), []).append(score)
    expected = {
        k: np.mean([np.mean([max(c) for c in itertools.combinations(g, k)]) for g in groups.values()])
        for k in (1, 2, 4)
    }
    assert best.rewards == pytest.approx(expected)
    assert best.shares[2] == pytest.approx((expected[2] - expected[1]) / (expected[4] - expected[1]))
    assert (best.prompts, best.left_out) == (16, 0)


@pytest.mark.slow
def test_the_prompts_shown_are_those_that_lose_or_gain_most(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    every = rescore(root, file(rewards, "other"), show=99).difference
    assert len(every.largest) == every.all.changed > 2
    margins = [abs(change["margin"]) for change in every.largest]
    assert margins == sorted(margins, reverse=True)
    for change in every.largest:
        before = [s["score_now"] for s in change["samples"] if s["weight_before"]]
        now = [s["score_now"] for s in change["samples"] if s["weight_now"]]
        assert change["margin"] == pytest.approx(np.mean(now) - np.mean(before))
    again = rescore(root, file(rewards, "other"), show=2).difference
    assert again.largest == every.largest[:2]


def test_prompts_without_kept_samples_are_counted_and_named_with_their_reason(copy: Copy) -> None:
    flags = {"selection.rule": "top_fraction", "selection.keep_fraction": 0.05}
    found = reselect(copy("plain"), flags, dry_run=True, show=3).difference
    assert found.all.now.samples == 2  # one of the 32 samples of each round
    assert (found.all.empty_before, found.all.empty_prompts) == (0, 14)
    assert len(found.empty_prompts) == 3
    assert all("kept fraction" in prompt["reason"] for prompt in found.empty_prompts)


# -- what lies on disk -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_run_is_untouched_and_neither_verify_nor_resume_minds(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    before = tree(root)
    rescore(root, file(rewards, "other"))
    reselect(root, {"selection.rule": "random"})
    after = tree(root)
    assert difference(before, {name: value for name, value in after.items() if name.split("/")[0] != "whatif"}) == ""
    assert verify(root) == []
    outcome = resume(root, without_rewards())
    assert outcome.rounds == 2
    assert difference(after, tree(root)) == ""
    resume(root, without_rewards(), redo="2/select")
    assert verify(root) == []
    assert (root / "whatif/other/round-0002/select/verdicts.parquet").is_file()


def test_a_dry_run_writes_nothing_and_tells_the_same(copy: Copy) -> None:
    root = copy("plain")
    before = tree(root)
    dry = reselect(root, {"selection.rule": "random"}, dry_run=True, show=2)
    assert difference(before, tree(root)) == ""
    wet = reselect(root, {"selection.rule": "random"}, show=2)
    assert dry.folder is None
    assert wet.folder == root / "whatif" / "random"
    assert dry.difference == wet.difference


@pytest.mark.slow
def test_a_second_call_finds_it_done_and_other_settings_under_its_name_are_refused(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    assert rescore(root, file(rewards, "other"), name="mine").worked
    before = tree(root)
    assert not rescore(root, file(rewards, "other"), name="mine").worked
    assert difference(before, tree(root)) == ""
    with pytest.raises(ConfigChanged, match=r"rewards\.reward_funcs: .*other → .*value\. Choose another --name"):
        rescore(root, file(rewards, "value"), name="mine")
    with pytest.raises(ConfigChanged, match="kind: rescore → select"):
        reselect(root, {}, name="mine")
    assert difference(before, tree(root)) == ""


@pytest.mark.slow
def test_a_reward_whose_code_has_changed_is_not_mixed_into_older_scores(copy: Copy, tmp_path: Path) -> None:
    root, code = copy("plain"), tmp_path / "mine.py"
    code.write_text(REWARDS)
    rescore(root, file(code, "other"), which="1")
    code.write_text(REWARDS.replace("answer * 3", "answer * 2"))
    with pytest.raises(ConfigChanged, match=r"rewards have changed \(their code"):
        rescore(root, file(code, "other"))


@pytest.mark.slow
def test_scores_of_samples_that_are_no_more_are_not_selected_from(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    rescore(root, file(rewards, "other"))
    resume(root, without_rewards(), redo="2/score")  # the same samples: the scores still hold
    assert reselect(root, {}, scores="other", dry_run=True).rounds == [1, 2]
    shorter = plain(root, rewards, sampling={"num_generations": 3})
    run(shorter, without_rewards(), redo="1/plan")
    with pytest.raises(RunDamaged, match=r"no round can be read: round 1: .*whatif/other.* was made from another"):
        reselect(root, {}, scores="other", dry_run=True)


@pytest.mark.slow
def test_an_interrupted_rescoring_goes_on_with_the_chunks_that_it_lacks(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    with pytest.raises(KeyboardInterrupt):
        rescore(root, file(rewards, "other"), observe=stop_at_first_chunk)
    heard: list[dict[str, Any]] = []
    rescore(root, file(rewards, "other"), observe=lambda kind, facts: heard.append(facts) if kind == "chunks" else None)
    assert heard[0] == {"round": 1, "stage": "score", "total": 2, "found": 1}
    whole = root.parent / "whole"
    shutil.copytree(root, whole, ignore=shutil.ignore_patterns("whatif"))
    rescore(whole, file(rewards, "other"))
    assert difference(tree(whole / "whatif"), tree(root / "whatif")) == ""


def stop_at_first_chunk(kind: str, facts: dict[str, Any]) -> None:
    if kind == "chunk":
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_reward_that_fails_leaves_room_for_a_fixed_one(copy: Copy, tmp_path: Path) -> None:
    root, code = copy("plain"), tmp_path / "mine.py"
    code.write_text(REWARDS)
    with pytest.raises(RewardError, match=r"round 1: .*no luck.*\. Fix the reward and rescore\.$"):
        rescore(root, file(code, "broken"))
    code.write_text(REWARDS.replace('raise ValueError("no luck")', "return [1.0 for _ in completions]"))
    assert rescore(root, file(code, "broken")).rounds == [1, 2]


@pytest.mark.slow
def test_a_reward_that_fails_leaves_its_name_free_for_other_settings(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    with pytest.raises(RewardError):
        rescore(root, {"rewards.reward_funcs": [f"{rewards}:broken"]}, name="mine")
    assert rescore(root, {"rewards.reward_funcs": [f"{rewards}:other"]}, name="mine").worked


def test_a_reward_that_cannot_be_loaded_leaves_nothing_behind(copy: Copy) -> None:
    root = copy("plain")
    with pytest.raises(ConfigError, match="did you mean 'length'"):
        rescore(root, {"rewards.reward_funcs": ["lenght"]})
    assert not (root / "whatif").exists()


def test_a_run_at_work_does_not_hold_up_a_whatif_but_another_maker_of_the_same_one_does(copy: Copy) -> None:
    root = copy("plain")
    with RunFolder(root).lock():
        reselect(root, {"selection.rule": "random"}, name="mine")
    with RunFolder(root / "whatif/mine").lock(), pytest.raises(RunInUse, match="or choose another --name"):
        reselect(root, {"selection.rule": "random"}, name="mine")


# -- damage and bad input --------------------------------------------------------------------------------------------


def damage_samples(root: Path) -> None:
    (root / "round-0002/generate/chunk-00001.parquet").unlink()


def harm_verdicts(root: Path) -> None:
    path = root / "round-0002/select/verdicts.parquet"
    path.write_bytes(path.read_bytes()[:-1])


def damage_manifest(root: Path) -> None:
    (root / "round-0002/plan/_COMMIT.json").write_text("{")


def unfinish(root: Path) -> None:
    (root / "round-0002/select/_COMMIT.json").unlink()


@pytest.mark.parametrize("harm", [damage_samples, harm_verdicts, damage_manifest, unfinish])
def test_rounds_that_cannot_be_read_are_named_and_the_others_done(copy: Copy, harm: Callable[[Path], None]) -> None:
    root = copy("plain")
    harm(root)
    found = reselect(root, {"selection.rule": "random"}, dry_run=True)
    assert found.rounds == [1]
    (missing,) = found.missing
    assert missing.startswith(f"round 2: {root}/round-0002/")
    with pytest.raises(RunDamaged, match="no round can be read: round 2: "):
        reselect(root, {"selection.rule": "random"}, which="2", dry_run=True)


@pytest.mark.slow
def test_a_damaged_whatif_is_named_and_not_built_upon(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    rescore(root, file(rewards, "other"))
    path = root / "whatif/other/round-0001/score/chunk-00000.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(RunDamaged, match=r"whatif/other/round-0001/score/chunk-00000\.parquet .* delete"):
        rescore(root, file(rewards, "other"))
    found = reselect(root, {}, scores="other", dry_run=True)
    assert found.rounds == [2]
    assert "whatif/other/round-0001/score" in found.missing[0]


def test_beta_needs_the_log_probabilities_that_the_run_recorded(copy: Copy) -> None:
    with pytest.raises(ConfigError, match=r"made with beta 0, which holds none.*--selection\.beta 0\.5 --from select"):
        reselect(copy("plain"), {"selection.beta": 0.5}, dry_run=True)
    root = copy("objects")  # made with beta 0.3
    reselect(root, {"selection.beta": 2.0}, name="strict")
    for row in pq.read_table(root / "whatif/strict/round-0002/select/verdicts.parquet").to_pylist():
        given = log_ratio(root, row["sample_id"])
        assert row["ranked_by"] == pytest.approx(row["score"] - 2.0 * given)


def log_ratio(root: Path, sample_id: str) -> float:
    ours, start = (
        next(
            row["log_prob"]
            for path in (root / "round-0002" / name).glob("chunk-*.parquet")
            for row in pq.read_table(path).to_pylist()
            if row["sample_id"] == sample_id
        )
        for name in ("logp", "logp-start")
    )
    return float(ours - start)


BAD: dict[str, tuple[Callable[[Path], WhatIfResult], str]] = {
    "no reward": (lambda root: rescore(root, {}), "needs --rewards.reward_funcs; got none. Write"),
    "a rule": (lambda root: rescore(root, {"selection.m": 2}), "`raftune select` changes the rule"),
    "a reward": (lambda root: reselect(root, {"rewards.retries": 2}), "`raftune rescore` changes the reward"),
    "a round": (lambda root: reselect(root, {"num_rounds": 2}), "what else changes needs new samples"),
    "more samples": (
        lambda root: reselect(root, {"sampling.num_generations": 9}),
        "at most 4, which round 1 generated",
    ),
    "a percentage": (
        lambda root: reselect(root, {"selection.rule": "top_fraction", "selection.keep_fraction": 30}),
        "write 0.3",
    ),
    "a bad name": (lambda root: reselect(root, {}, name="../up", dry_run=True), "letters, digits"),
    "no such round": (lambda root: reselect(root, {}, which="7"), "--round must be all or one of 1, 2; got '7'"),
    "no such scores": (lambda root: reselect(root, {}, scores="none"), "got 'none'; it wrote none yet"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_is_refused_with_a_reason_and_nothing_is_written(copy: Copy, name: str) -> None:
    root = copy("plain")
    ask, words = BAD[name]
    with pytest.raises(ConfigError) as caught:
        ask(root)
    assert words in str(caught.value)
    assert not (root / "whatif").exists()


def test_a_reward_whose_column_the_prompts_lack_is_refused(copy: Copy, rewards: Path) -> None:
    root = copy("plain")
    with pytest.raises(ConfigError, match=r"rewards\.reward_funcs: needs_topic needs 'topic', which is no column of"):
        rescore(root, file(rewards, "needs_topic"))
    assert not (root / "whatif").exists()


def test_a_run_whose_rewards_were_objects_says_what_cannot_be_called(copy: Copy) -> None:
    root = copy("objects")
    with pytest.raises(ConfigError, match="the run's own were Python objects, which no command can call"):
        rescore(root, {})
    found = reselect(root, {"selection.rule": "random"}, dry_run=True)
    assert "call train(redo='select'): its rewards are Python objects" in found.redo


def test_a_new_rule_takes_back_what_only_the_old_one_read(copy: Copy) -> None:
    root = copy("plain")
    resume_config = RunFolder(root).read_config()
    resume_config["selection"] |= {"rule": "top_m", "m": 2}
    run({**resume_config, "output_dir": str(root)}, without_rewards(), redo="1/select")
    found = reselect(root, {"selection.rule": "best_of_k"}, dry_run=True)
    assert found.changes == {"selection.rule": ("top_m", "best_of_k"), "selection.m": (2, None)}
    assert "--selection.m none --selection.rule best_of_k --from select" in found.redo


# -- as commands -----------------------------------------------------------------------------------------------------


def test_the_commands_show_the_table_the_completions_and_how_to_really_do_so(
    copy: Copy, rewards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy("text")
    code = main(["rescore", str(root), "--rewards.reward_funcs", "length", "--rewards.reward_funcs", "repetition"])
    assert (code, "length needs either target" in capsys.readouterr().err) == (2, True)
    spec = '[{"spec": "length", "options": {"target": 3}}]'
    assert main(["rescore", str(root), "--rewards.reward_funcs", spec, "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert "letters: before" in shown
    assert "length: before" in shown
    assert f"Written to {root}/whatif/length; the run is as it was." in shown
    assert shown.splitlines()[-1].startswith(f"To really do so: raftune resume {root} --rewards.reward_funcs ")
    assert main(["select", str(root), "--selection.rule", "random", "--dry-run", "--diff"]) == 0
    shown = capsys.readouterr().out
    assert "prompts that change, those that gain or lose most" in shown
    assert "Best of k samples by letters, unbiased: 1: " in shown
    assert "Nothing was written (--dry-run)." in shown
    assert not (root / "whatif/random").exists()


def test_json_is_one_object_with_everything(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    root = copy("plain")
    words = ["select", str(root), "--selection.rule", "top_m", "--selection.m", "2", "--show", "1", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(root / "whatif/top_m-m-2")
    assert found["changes"]["selection.m"] == {"before": None, "now": 2}
    assert found["difference"]["all"]["now"]["samples"] == 32
    assert len(found["difference"]["largest"]) == 1
    assert found["missing"] == []
