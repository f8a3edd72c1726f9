"""Runs the stages `score` and `select` again over existing samples, into a folder of their own."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raftune.analysis.whatif.difference import Difference, compare
from raftune.config.load import differences, merge, nested, validate
from raftune.config.run import RunConfig
from raftune.config.selection import RULES, rule_class
from raftune.engines.local import InProcessEngine
from raftune.engines.run_stage import run_stage
from raftune.errors import ConfigChanged, ConfigError, RewardError, RunDamaged, RunInUse, RunTooNew, StoreError
from raftune.policies.registry import FAMILIES, family_of
from raftune.protocols import Callback, ChunkedStage, Stage
from raftune.rewards.loading import load_rewards
from raftune.rewards.reward_set import RewardSet, incompatible_rewards, lacking
from raftune.runtime.assembly import limit_threads
from raftune.runtime.staleness import change
from raftune.sanitize import shell_command
from raftune.stages.plan import read_plan
from raftune.stages.score import ScoreStage
from raftune.stages.select import FIX, SelectStage
from raftune.starters.resolve import resolve_starters
from raftune.store.commit import stage_key
from raftune.store.files import json_bytes, write_json
from raftune.store.job import Engine, StageJob, fields_of, hashes_of, make_job
from raftune.store.kinds import how_to_go_on
from raftune.store.parquet import column_names
from raftune.store.run import RunFolder

FEWER = "sampling.num_generations"
FOLDER, RECORD = "whatif", "whatif.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class WhatIfResult:
    """Result of a what-if run. `folder` is None if nothing was written; `missing` names unreadable rounds.

    changes: the fields that differ from the run's, each with the run's value and its own. redo: the command that really
    does so.
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
    """The run's samples under another reward, and what its own rule would keep of them; nothing is generated.

    `flags` are dotted fields of `rewards`. Written to whatif/NAME; a second call finds it done. Raises ConfigError,
    ConfigChanged where NAME has other settings, RewardError, RunDamaged where no round can be read.
    """
    _check_fields(flags, ("rewards.",), "rescore")
    run = RunFolder(root)
    before = run.read_config()
    if not flags.get("rewards.reward_funcs"):
        objects = " (the run's own were Python objects, which no command can call)"
        raise ConfigError(
            f"rescore needs --rewards.reward_funcs; got none{'' if before['rewards']['reward_funcs'] else objects}. "
            "Write file.py:function, a model, or a built-in."
        )
    after = validate(merge([before, nested(flags)]))
    overlay = OverlayRun(_folder(run, name, after.rewards.names), run, {"score", "select"})
    return WhatIfRun(run, overlay, validate(before), after).execute(which, show, observe, {"scores": None})


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
    """What another rule, or a smaller K, would keep of the run's samples; nothing is generated or scored.

    `flags` are dotted fields of `selection`, and sampling.num_generations: the policy's first so many samples of each
    prompt, which is what it would have generated. `scores` names a what-if of `rescore`. Written to whatif/NAME, or
    with `dry_run` nowhere. Raises as `rescore` does.
    """
    _check_fields(flags, ("selection.", FEWER), "select")
    run = RunFolder(root)
    before = run.read_config()
    scored, sections = (run, {}) if scores is None else scores_of(run, scores)
    base, changes = merge([before, sections]), nested(flags)
    if changes.get("selection", {}).get("rule") is not None:  # drop options that the new rule does not read
        options = RULES[rule].model_fields if (rule := rule_class(changes["selection"])) in RULES else None
        kept = {key: value for key, value in base["selection"].items() if options is None or key in options}
        after = validate(merge([{**base, "selection": kept}, changes]))
    else:
        after = validate(merge([base, changes]))
    values = _changed_values(base, after.model_dump(mode="json")) if name is None else []
    # never the name under which the scores lie
    root = _folder(run, name, values if scores is None else [scored.root.name, *(values or ["selected"])])
    record = None if dry_run else {"scores": None if scores is None else scored.root.name}
    with tempfile.TemporaryDirectory() if dry_run else contextlib.nullcontext(root) as folder:
        whatif = WhatIfRun(run, OverlayRun(Path(folder), scored, {"select"}), validate(before), after)
        return whatif.execute(which, show, observe, record)


class OverlayRun(RunFolder):
    """A run with some stages replaced by those of another folder."""

    def __init__(self, root: Path, beneath: RunFolder, replaced: Collection[str]) -> None:
        super().__init__(root)
        self.beneath, self.replaced = beneath, frozenset(replaced)

    def folder(self, round_: int, name: str) -> Path:
        return super().folder(round_, name) if name in self.replaced else self.beneath.folder(round_, name)


class WhatIfRun:
    """A what-if as the context of its stages: `run` is the overlay over `original`."""

    def __init__(self, original: RunFolder, run: OverlayRun, before: RunConfig, config: RunConfig) -> None:
        self.original, self.before, self.config = original, before, config
        self.run: RunFolder = run
        self.engine: Engine = InProcessEngine(config.engine)
        self.scores_anew = "score" in run.replaced
        self.plain = config.model_dump(mode="json")
        self.shards = ("generate", "teach") if config.sampling.teacher else ("generate",)
        self._rewards: RewardSet | None = None

    def execute(
        self, which: str, show: int, observe: Callback, record: Mapping[str, str | None] | None
    ) -> WhatIfResult:
        """Runs what is not committed yet, and compares with what the run learned from. `record` is stored unless None,
        with all settings that shape scores and verdicts."""
        rounds, missing = self.readable_rounds(which)
        self.check_num_generations(rounds)
        root = self.run.root if record is not None else None
        sections = ("rewards", "selection", "sampling")  # that a what-if may change
        plain = self.before.model_dump(mode="json")
        before, after = ({name: config[name] for name in sections} for config in (plain, self.plain))
        changes = differences(before, after)
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: self._rewards.close() if self._rewards is not None else None)
            if self.scores_anew:
                self.rewards()  # a reward that cannot be loaded leaves nothing behind
            if record is not None:
                try:
                    stack.enter_context(self.run.lock())
                except RunInUse as error:
                    advice = "Wait for it, or choose another --name."
                    raise RunInUse(f"{root} is being made by another process. {advice}") from error
                sampling = {"num_generations": self.config.sampling.num_generations}
                kind = "rescore" if self.scores_anew else "select"
                keep_record(self.run, {"kind": kind, **record, "configuration": {**after, "sampling": sampling}})
            return WhatIfResult(
                self.original.root,
                root.name if root is not None else "",
                root,
                self.work(rounds, observe),
                changes,
                rounds,
                missing,
                compare(self.original, self.run, rounds, show),
                self.redo(changes) if changes else "",
            )

    # -- the stages, as `run_stage` needs them -------------------------------------------------------------------------

    def stages(self, round_: int) -> list[Stage]:
        """The stages of this what-if."""
        config = self.config
        generated = read_plan(self.run.folder(round_, "plan"))["num_generations"]
        fewer = config.sampling.num_generations
        select = SelectStage(
            config.selection,
            seed=config.seed,
            round_=round_,
            shards=self.shards,
            max_failures=config.rewards.max_failure_fraction,
            num_generations=fewer if fewer < generated else None,
        )
        return [*([ScoreStage(self.rewards, reads=self.shards)] if self.scores_anew else []), select]

    def job(self, stage: Stage, round_: int) -> StageJob:
        return make_job(self.run, stage, round_, self.plain)

    def engine_for(self, stage: ChunkedStage) -> Engine:
        return self.engine

    def prune(self, round_: int, best: int | None) -> None:
        """Does nothing: a what-if makes no models."""

    def rewards(self) -> RewardSet:
        """The new rewards, loaded once."""
        if self._rewards is None:
            self._rewards = load_rewards(resolve_starters(self.config).rewards)
            family = self.config.policy.family
            # Code that a run's configuration names is not imported to look at the run.
            media = family_of(self.config).media if family in FAMILIES else None
            if media is not None and (findings := [*incompatible_rewards(self._rewards, media, family)]):
                raise ConfigError("\n".join(findings))
            data = self.original.folder(0, "data") / "train.parquet"
            with contextlib.suppress(RunDamaged, FileNotFoundError):  # a what-if needs the samples only
                findings = [*lacking(self._rewards, column_names(data), "the prompts", "rewards.reward_funcs")]
                if findings:
                    raise ConfigError("\n".join(findings))
            if self._rewards.has_weights:
                limit_threads(self.config)  # they shape a reward model's scores
        return self._rewards

    def work(self, rounds: list[int], observe: Callback) -> bool:
        """Runs what is not committed yet; True if anything had to be.

        Raises ConfigChanged for a stage with other settings, RunDamaged for one that is not whole.
        """
        advice = f"Choose another --name, or delete {self.run.root}"
        for round_, stage in [(number, stage) for number in rounds for stage in self.stages(number)]:
            commit = self.run.commit(round_, stage.writes)
            if commit is None:
                continue
            if faults := commit.faults(self.run.folder(round_, stage.writes)):
                raise RunDamaged(f"{faults[0]}. {advice}: it can be made again.")
            fields, hashes = fields_of(stage, self.plain), hashes_of(self.run, stage, round_)
            if stage_key(stage.name, fields, hashes) != commit.key:
                changes = in_words(differences(commit.fields, fields))
                raise ConfigChanged(
                    f"{stage.name} of round {round_} in {self.run.root} was made otherwise: {changes}. {advice}."
                )
        worked = False
        observe("begin", {"root": str(self.run.root), "set_aside": [], "changed": {}})
        for round_ in rounds:
            observe("round_begin", {"round": round_, "of": rounds[-1]})
            for stage in self.stages(round_):
                try:
                    worked |= run_stage(self, stage, round_, lambda kind, **facts: observe(kind, facts))
                except RewardError as error:
                    fix = "Select from scores with fewer failures."
                    if self.scores_anew:
                        fix = "Fix the reward and rescore."
                        self.run.clear(round_, "score")  # useless, and in the way of a fixed reward
                        if not any(self.run.is_committed(*place) for place in self.run.places()):
                            (self.run.root / RECORD).unlink(missing_ok=True)  # the name is free for other settings
                    raise RewardError(f"round {round_}: {str(error).partition(FIX)[0]}{fix}") from error
        return worked

    # -- checks --------------------------------------------------------------------------------------------------------

    def readable_rounds(self, which: str) -> tuple[list[int], list[str]]:
        """The rounds that `all` or a number means and that can be read, and why the others cannot.

        Raises StoreError, ConfigError and, where none can be read, RunDamaged.
        """
        root, trained = self.original.root, [round_ for round_ in self.original.rounds() if round_ > 0]
        if not trained:
            advice = how_to_go_on(root, self.original.read_config())
            raise StoreError(f"{root} has generated nothing to train on. {advice}")
        if which != "all" and (not which.isdigit() or int(which) not in trained):
            listed = ", ".join(map(str, trained)) if len(trained) < 4 else f"{trained[0]} … {trained[-1]}"
            raise ConfigError(f"--round must be all or one of {listed}; got {which!r}. Choose one of these.")
        beta, likelihoods = self.config.selection.beta, ["logp", "logp-start"]
        readable, missing = [], []
        for round_ in trained if which == "all" else [int(which)]:
            names = ["plan", *self.shards, *(["score"] if not self.scores_anew else [])]
            if beta > 0:
                present = any(self.run.folder(round_, name).is_dir() for name in likelihoods)
                if not present and self.before.selection.beta <= 0:
                    flags = ("--selection.beta", f"{beta:g}", "--from", "select")
                    command = shell_command("raftune", "resume", root, *flags)
                    raise ConfigError(
                        f"selection.beta above 0 ranks by log-probabilities; got {beta:g} for a run made with beta 0, "
                        f"which holds none. `{command}` keeps the samples and computes them."
                    )
                names += likelihoods
            faults = _faults(self.run, round_, names) + _faults(self.original, round_, ["select"])
            if faults:
                more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
                missing.append(f"round {round_}: {faults[0]}{more}")
            else:
                readable.append(round_)
        if not readable:
            raise RunDamaged(f"no round can be read: {'; '.join(missing)}. `raftune verify` lists what is wrong.")
        return readable, missing

    def check_num_generations(self, rounds: list[int]) -> None:
        """Raises ConfigError for more samples than there are, or fewer than the ranks of the scores count."""
        k = self.config.sampling.num_generations
        for round_ in rounds:
            generated = read_plan(self.run.folder(round_, "plan"))["num_generations"]
            if k > generated and k != self.before.sampling.num_generations:
                raise ConfigError(
                    f"{FEWER} must be at most {generated}, which round {round_} generated for each prompt; got "
                    f"{k}. More must be generated: start another run, or resume this one with --from plan."
                )
            if k < generated and self.config.rewards.combine == "rank" and not self.scores_anew:
                raise ConfigError(
                    f"{FEWER} must be {generated} where rewards.combine is rank; got {k}. The scores are ranks "
                    f"among all {generated} candidates of a prompt, and among fewer they would be others: leave it out."
                )

    # -- the command that does it --------------------------------------------------------------------------------------

    def redo(self, changes: Mapping[str, tuple[Any, Any]]) -> str:
        """The command that applies the changes to the run itself, from the first stage that depends on them."""
        original = self.original
        # samples whose latents are gone must be generated again, with the same result
        dropped = any(original.dropped_columns(round_, "generate") for round_ in original.rounds())
        generate = ",generate" if dropped else ""
        if {"rewards.reward_funcs", "rewards.batch_size"} & changes.keys():
            first = ("evaluation-score" if self.config.evaluation.num_prompts else "score") + generate
        elif "rewards.combine" in changes:  # evaluations always take the sum
            first = "score" + generate
        else:
            first = "plan" if FEWER in changes else "select" + generate
        again = " (which generates again)" if FEWER in changes else ""
        if not self.config.rewards.reward_funcs:
            return (
                f"To really do so{again}, change {', '.join(sorted(changes))} in the script that made the run, and "
                f"call train(redo={first!r}): its rewards are Python objects."
            )
        flags = []
        for name, (_, value) in sorted(changes.items()):
            value = brief(value)
            text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
            flags += [f"--{name}", text]
        command = shell_command("raftune", "resume", original.root, *flags, "--from", first)
        return f"To really do so{again}: {command}"


# -- the folder whatif/NAME, laid out like a run directory ------------------------------------------------------------


def _folder(run: RunFolder, name: str | None, parts: Sequence[str]) -> Path:
    """The folder of the what-if of this name, or of one made of the parts. Raises ConfigError for an unusable name."""
    if name is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("._-")[:100] or "same"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name must be letters, digits, '.', '_' and '-'; got {name!r}. Shorten or rename it.")
    return run.root / FOLDER / name


def scores_of(run: RunFolder, reference: str) -> tuple[OverlayRun, dict[str, Any]]:
    """The run under the scores of a what-if, and the sections of the configuration of these.

    Raises ConfigError where there are none under that name.
    """
    name = reference.removeprefix(f"{FOLDER}/").rstrip("/")
    root = run.root / FOLDER / name if _NAME.fullmatch(name) else Path(reference)
    scored = sorted(
        path.parent.name for path in run.root.glob(f"{FOLDER}/*/{RECORD}") if any(path.parent.glob("*/score"))
    )
    if root.parent != run.root / FOLDER or root.name not in scored:
        written = f"it wrote {', '.join(scored)}" if scored else "it wrote none yet"
        command = shell_command("raftune", "rescore", run.root)
        raise ConfigError(f"--scores must name scores that `{command}` wrote; got {reference!r}; {written}.")
    return OverlayRun(root, run, {"score"}), read_record(root)["configuration"]


def read_record(root: Path) -> dict[str, Any]:
    """The settings of the what-if. Raises RunDamaged."""
    path = root / RECORD
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and isinstance(record.get("configuration"), dict):
            return record
    raise RunDamaged(f"{path} cannot be read. Delete {root}: it can be made again.")


def keep_record(run: RunFolder, record: Mapping[str, Any]) -> None:
    """Stores the settings. Raises ConfigChanged where this name has others already."""
    path = run.root / RECORD
    if not path.exists():
        write_json(run.tmp, path, record)
    elif path.read_bytes() != json_bytes(record):
        old, new = (
            {**{name: value for name, value in entry.items() if name != "configuration"}, **entry["configuration"]}
            for entry in (read_record(run.root), record)
        )
        raise ConfigChanged(
            f"{run.root} was made otherwise: {in_words(differences(old, new))}. Choose another --name, or delete that "
            "folder."
        )


def _check_fields(flags: Mapping[str, Any], allowed: tuple[str, ...], command: str) -> None:
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


def _changed_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The parts of the default name: the rule's name if it changed, and every other changed field with its value."""
    fields = RULES[rule_class(after["selection"])].model_fields
    parts = []
    for name, (old, value) in sorted(differences(before, after).items(), key=lambda item: item[0] != "selection.rule"):
        field = fields.get(name.split(".")[1])
        implied = field is None or (old is None and value == field.default)  # by the rule alone
        if name.startswith(FEWER) or (name.startswith("selection.") and not implied):
            parts.append(str(value) if name == "selection.rule" else f"{name.split('.')[1]}-{value}")
    return parts


def _faults(run: RunFolder, round_: int, names: Sequence[str]) -> list[str]:
    """Why these stages of the round cannot be read, a line each."""
    faults: list[str] = []
    for name in names:
        try:
            committed = run.is_committed(round_, name)
            faults += run.faults_of(round_, name) if committed else [f"{run.folder(round_, name)} is not finished"]
        except RunTooNew as error:
            faults.append(str(error).split(". ")[0])
    return faults


def in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Field: before → now, of every difference; of long values that begin alike, the ends."""
    width = 40
    lines = []
    for name, pair in sorted(changes.items()):
        old, new = map(brief, pair)
        texts = str(old), str(new)
        if max(map(len, texts)) > width and texts[0][: width - 3] == texts[1][: width - 3]:
            old, new = (text if len(text) <= width else f"…{text[1 - width :]}" for text in texts)
        lines.append(change(name, old, new))
    return ", ".join(lines) or "what it was made from has changed"


def brief(value: Any) -> Any:
    """The value; of rewards the options that are set, a spec alone as its text."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, Mapping) for v in value):
        return value
    usual = {"weight": 1.0}
    specs = [{k: v for k, v in spec.items() if v not in (None, {}, usual.get(k))} for spec in value]
    short = [spec["spec"] if spec.keys() == {"spec"} else spec for spec in specs]
    return short[0] if len(short) == 1 and isinstance(short[0], str) else short
