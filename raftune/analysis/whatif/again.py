"""Runs the stages `score` and `select` again over existing samples, into a folder of their own."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raftune.analysis.whatif.difference import Difference, compare
from raftune.analysis.whatif.folder import (
    RECORD,
    OverlayRun,
    brief,
    faults,
    in_words,
    keep_record,
    place_of,
    rounds_of,
    scores_of,
)
from raftune.config.load import differences, merge, nested, validate
from raftune.config.run import RunConfig
from raftune.config.selection import RULES, rule_class
from raftune.engines.local import InProcessEngine
from raftune.engines.run_stage import run_stage
from raftune.errors import ConfigChanged, ConfigError, RewardError, RunDamaged
from raftune.policies.registry import FAMILIES, family_of
from raftune.protocols import Callback, ChunkedStage, Stage
from raftune.rewards.loading import load_panel
from raftune.rewards.panel import SampleScorer, misfits
from raftune.runtime.assembly import limit_threads
from raftune.sanitize import shell_command
from raftune.stages.plan import read_plan
from raftune.stages.score import ScoreStage
from raftune.stages.select import FIX, SelectStage
from raftune.starters.resolve import resolve_starters
from raftune.store.commit import stage_key
from raftune.store.job import Engine, StageJob, fields_of, hashes_of, make_job
from raftune.store.run import RunFolder

FEWER = "sampling.num_generations"
SCORED_BY = {"rewards.reward_funcs", "rewards.batch_size"}
ASKED = ("rewards", "selection", "sampling")  # the sections of the configuration that a what-if may change


@dataclass(frozen=True)
class WhatIfResult:
    """Result of a what-if run. `folder` is None if nothing was written; `missing` names unreadable rounds.

    changes: the fields that differ from the run's, each with the run's value and its own. redo: how to really do so.
    """

    run: Path
    name: str
    folder: Path | None
    worked: bool
    changes: dict[str, tuple[Any, Any]]
    rounds: list[int]
    missing: list[str]
    difference: Difference
    redo: str


def rescore(
    root: str | Path,
    flags: Mapping[str, Any],
    *,
    which: str = "all",
    name: str | None = None,
    show: int = 3,
    observe: Callback = lambda kind, facts: None,
) -> WhatIfResult:
    """The run's draws under another reward, and what its own rule would keep of them; nothing is generated.

    `flags` are dotted fields of `rewards`. Written to whatif/NAME; a second call finds it done. Raises ConfigError,
    ConfigChanged where NAME stands for something else, RewardError, RunDamaged where no round can be read.
    """
    refuse_fields(flags, ("rewards.",), "rescore")
    run = RunFolder(root)
    before = run.read_config()
    if not flags.get("rewards.reward_funcs"):
        raise ConfigError(missing_rewards(before))
    after = validate(merge([before, nested(flags)]))
    place = OverlayRun(place_of(run, name or slug(after.rewards.names)), run, {"score", "select"})
    return WhatIfRun(run, place, validate(before), after, record("rescore", None, after)).whatif(which, show, observe)


def reselect(
    root: str | Path,
    flags: Mapping[str, Any],
    *,
    which: str = "all",
    name: str | None = None,
    scores: str | None = None,
    dry_run: bool = False,
    show: int = 3,
    observe: Callback = lambda kind, facts: None,
) -> WhatIfResult:
    """What another rule, or a smaller K, would keep of what the run has generated; nothing is generated or scored.

    `flags` are dotted fields of `selection`, and sampling.num_generations: the policy's first so many samples of each
    prompt, which is what it would have generated. `scores` names a what-if of `rescore`. Written to whatif/NAME, or
    with `dry_run` nowhere. Raises as `rescore` does.
    """
    refuse_fields(flags, ("selection.", FEWER), "select")
    run = RunFolder(root)
    before = run.read_config()
    under, other = (run, {}) if scores is None else scores_of(run, scores)
    base = merge([before, other])
    given = nested(flags)
    after = validate(merge([{**base, "selection": for_rule(base["selection"], given.get("selection", {}))}, given]))
    values = [*changed_values(base, plain_of(after))]
    if scores is not None:
        values = [under.root.name, *(values or ["selected"])]  # never the name under which the scores lie
    name = name or slug(values)
    asked = record("select", under.root.name if scores else None, after)
    if not dry_run:
        place = OverlayRun(place_of(run, name), under, {"select"})
        return WhatIfRun(run, place, validate(before), after, asked).whatif(which, show, observe)
    place_of(run, name)
    with tempfile.TemporaryDirectory() as folder:
        place = OverlayRun(Path(folder), under, {"select"})
        return WhatIfRun(run, place, validate(before), after, None).whatif(which, show, observe)


@dataclass
class WhatIfRun:
    """One what-if at work: `run` is an OverlayRun. `asked` is stored; None stores nothing."""

    run_as_it_is: RunFolder
    run: RunFolder
    before: RunConfig
    config: RunConfig
    asked: dict[str, Any] | None

    def __post_init__(self) -> None:
        self.engine: Engine = InProcessEngine(self.config.engine)
        self.anew = self.run.folder(1, "score").is_relative_to(self.run.root)  # else the scores are read, not made
        self.plain = plain_of(self.config)
        self.shards = ("generate", "teach") if self.config.sampling.teacher else ("generate",)
        self._panel: SampleScorer | None = None

    def whatif(self, which: str, show: int, observe: Callback) -> WhatIfResult:
        """Does what is not done yet, and compares with what the run learned from."""
        rounds, missing = self.readable(rounds_of(self.run_as_it_is, which))
        self.refuse_more_draws(rounds)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            if self.anew:
                self.panel()  # a reward that cannot be loaded leaves nothing behind
            if self.asked is not None:
                stack.enter_context(self.run.lock())
                keep_record(self.run, self.asked)
            worked = self.work(rounds, observe)
            return WhatIfResult(
                self.run_as_it_is.root,
                self.run.root.name if self.asked is not None else "",
                self.run.root if self.asked is not None else None,
                worked,
                self.changes(),
                rounds,
                missing,
                compare(self.run_as_it_is, self.run, rounds, show),
                self.redo(),
            )

    # -- the stages, as the loop knows them ---------------------------------------------------------------------------

    def stages(self, round_: int) -> list[Stage]:
        """Those of this what-if."""
        config = self.config
        drawn = read_plan(self.run.folder(round_, "plan"))["num_generations"]
        fewer = config.sampling.num_generations
        rule = SelectStage(
            config.selection,
            seed=config.seed,
            round_=round_,
            shards=self.shards,
            max_failures=config.rewards.max_failure_fraction,
            num_generations=fewer if fewer < drawn else None,
        )
        return [*([ScoreStage(self.panel, reads=self.shards)] if self.anew else []), rule]

    def job(self, stage: Stage, round_: int) -> StageJob:
        return make_job(self.run, stage, round_, self.plain)

    def engine_for(self, stage: ChunkedStage) -> Engine:
        return self.engine

    def prune(self, round_: int, best: int | None) -> None:
        """Nothing to do: a what-if makes no models."""

    def work(self, rounds: list[int], observe: Callback) -> bool:
        """Runs what is not committed yet; True if anything had to be."""
        for round_ in rounds:
            for stage in self.stages(round_):
                self.refuse_other(stage, round_)
        worked = False
        observe("begin", {"root": str(self.run.root), "set_aside": [], "changed": {}})
        for round_ in rounds:
            observe("round_begin", {"round": round_, "of": rounds[-1]})
            for stage in self.stages(round_):
                try:
                    worked |= run_stage(self, stage, round_, lambda kind, **facts: observe(kind, facts))
                except RewardError as error:
                    if self.anew:
                        self.run.clear(round_, "score")  # of no use, and in the way of a mended reward
                        self.forget()
                    fix = "Fix the reward and rescore." if self.anew else "Select from scores with fewer failures."
                    raise RewardError(f"round {round_}: {str(error).partition(FIX)[0]}{fix}") from error
        return worked

    def forget(self) -> None:
        """Takes back what was asked while nothing came of it: the name is free for other settings."""
        if not any(self.run.is_committed(*place) for place in self.run.places()):
            (self.run.root / RECORD).unlink(missing_ok=True)

    def panel(self) -> SampleScorer:
        """The rewards asked for, loaded once."""
        if self._panel is None:
            self._panel = SampleScorer(load_panel(resolve_starters(self.config).rewards))
            family = self.config.policy.family
            # Code that a run's configuration names is not imported to look at the run.
            media = family_of(self.config).media if family in FAMILIES else None
            if media is not None and (findings := [*misfits(self._panel.panel, media, family)]):
                raise ConfigError("\n".join(findings))
            if self._panel.panel.has_weights:
                limit_threads(self.config)  # they shape a reward model's scores
        return self._panel

    def close(self) -> None:
        if self._panel is not None:
            self._panel.close()

    # -- what stands in the way ----------------------------------------------------------------------------------------

    def readable(self, rounds: list[int]) -> tuple[list[int], list[str]]:
        """The rounds that can be read, and why the others cannot. Raises RunDamaged where none can, ConfigError."""
        beta = self.config.selection.beta
        found, missing = [], []
        for round_ in rounds:
            names = ["plan", *self.shards, *(["score"] if not self.anew else [])]
            if beta > 0:
                names += self.likelihoods(round_, beta)
            wrong = faults(self.run, round_, names) + faults(self.run_as_it_is, round_, ["select"])
            if wrong:
                missing.append(f"round {round_}: {wrong[0]}{f' (and {len(wrong) - 1} more)' if wrong[1:] else ''}")
            else:
                found.append(round_)
        if not found:
            raise RunDamaged(f"no round can be read: {'; '.join(missing)}. `raftune verify` lists what is wrong.")
        return found, missing

    def likelihoods(self, round_: int, beta: float) -> list[str]:
        """The stages that beta needs. Raises ConfigError where the run never made them."""
        names = ["logp", "logp-start"]
        if any(self.run.folder(round_, name).is_dir() for name in names) or self.before.selection.beta > 0:
            return names
        flags = ("--selection.beta", f"{beta:g}", "--from", "select")
        command = shell_command("raftune", "resume", self.run_as_it_is.root, *flags)
        raise ConfigError(
            f"selection.beta above 0 ranks by log-probabilities; got {beta:g} for a run made with beta 0, which holds "
            f"none. `{command}` keeps the samples and computes them."
        )

    def refuse_more_draws(self, rounds: list[int]) -> None:
        """Raises ConfigError where more samples are asked for than there are, or fewer than the scores' ranks count."""
        wanted = self.config.sampling.num_generations
        for round_ in rounds:
            drawn = read_plan(self.run.folder(round_, "plan"))["num_generations"]
            if wanted > drawn and wanted != self.before.sampling.num_generations:
                raise ConfigError(
                    f"{FEWER} must be at most {drawn}, which round {round_} generated for each prompt; got {wanted}. "
                    "More must be generated: start another run, or resume this one with --from plan."
                )
            if wanted < drawn and self.config.rewards.combine == "rank" and not self.anew:
                raise ConfigError(
                    f"{FEWER} must be {drawn} where rewards.combine is rank; got {wanted}. The scores are ranks among "
                    f"all {drawn} candidates of a prompt, and among fewer they would be others: leave it out."
                )

    def refuse_other(self, stage: Stage, round_: int) -> None:
        """Raises ConfigChanged where this stage was made from something else, RunDamaged where it is not whole."""
        commit = self.run.commit(round_, stage.writes)
        if commit is None:
            return
        again = f"Choose another --name, or delete {self.run.root}"
        if wrong := commit.faults(self.run.folder(round_, stage.writes)):
            raise RunDamaged(f"{wrong[0]}. {again}: it can be made again.")
        fields, hashes = fields_of(stage, self.plain), hashes_of(self.run, stage, round_)
        if stage_key(stage.name, fields, hashes) != commit.key:
            words = in_words(differences(commit.fields, fields))
            raise ConfigChanged(
                f"{stage.name} of round {round_} in {self.run.root} was made otherwise: {words}. {again}."
            )

    # -- what is told --------------------------------------------------------------------------------------------------

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """The fields that differ from the run's."""
        before, after = (
            {name: value for name, value in plain_of(config).items() if name in ASKED}
            for config in (self.before, self.config)
        )
        return differences(before, after)

    def redo(self) -> str:
        """How to really do so, in words; empty where nothing differs."""
        changes = self.changes()
        if not changes:
            return ""
        first = self.first_stage(changes)
        again = " (which generates again)" if FEWER in changes else ""
        if not self.config.rewards.reward_funcs:
            return (
                f"To really do so{again}, change {', '.join(sorted(changes))} in the script that made the run, and "
                f"call train(redo={first!r}): its rewards are Python objects."
            )
        words = [word for name, (_, value) in sorted(changes.items()) for word in as_flag(name, value)]
        command = shell_command("raftune", "resume", self.run_as_it_is.root, *words, "--from", first)
        return f"To really do so{again}: {command}"

    def first_stage(self, changes: Mapping[str, Any]) -> str:
        """The first stage that these changes shape: with it, all that is stale after it is done again.

        What was generated comes with it where the latents of what was not kept are gone: it is generated again as it
        was.
        """
        run = self.run_as_it_is
        drawn = ",generate" if any(run.dropped_columns(round_, "generate") for round_ in run.rounds()) else ""
        if SCORED_BY & changes.keys():
            return ("evaluation-score" if self.config.evaluation.num_prompts else "score") + drawn
        if "rewards.combine" in changes:  # evaluations take the sum in any case
            return "score" + drawn
        return "plan" if FEWER in changes else "select" + drawn


def plain_of(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def record(kind: str, scores: str | None, config: RunConfig) -> dict[str, Any]:
    """What is asked: everything of the configuration that shapes scores and verdicts."""
    plain = plain_of(config)
    fewer = {"num_generations": plain["sampling"]["num_generations"]}
    decides = {"rewards": plain["rewards"], "selection": plain["selection"], "sampling": fewer}
    return {"kind": kind, "scores": scores, "configuration": decides}


def refuse_fields(flags: Mapping[str, Any], allowed: tuple[str, ...], command: str) -> None:
    """Raises ConfigError for a field that this command does not change."""
    for name in flags:
        if not name.startswith(allowed):
            fields = " and ".join(f"{prefix}*" if prefix.endswith(".") else prefix for prefix in allowed)
            other = {
                "rewards": "`raftune rescore` changes the reward",
                "selection": "`raftune select` changes the rule",
            }
            hint = other.get(name.split(".")[0], "what else changes needs new samples: `raftune train … --from STAGE`")
            raise ConfigError(f"--{name} cannot be asked of `raftune {command}`, which changes {fields}; {hint}.")


def missing_rewards(config: Mapping[str, Any]) -> str:
    objects = (
        "" if config["rewards"]["reward_funcs"] else " (the run's own were Python objects, which no command can call)"
    )
    return f"rescore needs --rewards.reward_funcs; got none{objects}. Write file.py:function, a model, or a built-in."


def for_rule(selection: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The run's section without what a newly given rule does not read: nobody should have to take that back."""
    section = RULES.get(rule_class(given)) if given.get("rule") is not None else None
    return {name: value for name, value in selection.items() if section is None or name in section.model_fields}


def changed_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What tells this selection from the run's: the rule by its name, every other field with its value."""
    fields = RULES[rule_class(after["selection"])].model_fields
    for name, (old, value) in sorted(differences(before, after).items(), key=lambda item: item[0] != "selection.rule"):
        field = fields.get(name.split(".")[1])
        follows = field is None or (old is None and value == field.default)  # from the rule alone
        if name.startswith(FEWER) or (name.startswith("selection.") and not follows):
            yield str(value) if name == "selection.rule" else f"{name.split('.')[1]}-{value}"


def slug(words: Any) -> str:
    """A folder's name from these words."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("._-")
    return text[:100] or "same"


def as_flag(name: str, value: Any) -> list[str]:
    """The field and its value as they are typed."""
    value = brief(value)
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    return [f"--{name}", text]
