"""The steps of supervised fine-tuning. Each writes its output atomically and is skipped if the output exists.

start/        the initial model: a reference and its hash, or weights
data.json     what was read; beside it rows.parquet (the training rows), held_out.parquet, skipped.jsonl,
              and the prompts of both for later rounds: prompts.jsonl, held_out.jsonl
model/        a plain folder for transformers or peft, with its tokenizer
report.json   steps and loss, and the perplexity of held-out completions before and after
"""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from raftune.config.load import differences, read_yaml, validate_as
from raftune.config.run import DataConfig, EngineConfig, RunConfig
from raftune.config.sampling import DiffusionSampling, SamplingConfig
from raftune.config.sft import SftConfig
from raftune.config.training import SftTraining
from raftune.data.demonstrations import choose, read_demonstrations
from raftune.data.rows import Demonstration, Feedback, SkippedRow, write_skipped
from raftune.errors import ConfigChanged, ConfigError, DataError, OutOfMemory, StoreError
from raftune.policies.registry import Family, family_of, start_policy
from raftune.protocols import Callback, Policy, SupportsLogProbs
from raftune.records import TOOLS, Prompt
from raftune.results.measures import loss_ends
from raftune.runtime.assembly import limit_threads
from raftune.sft.rows import EncodedDemonstrations, held_out_prompts, name_of, of_one_kind, rows_schema
from raftune.starters.resolve import resolve_starters
from raftune.store.committed import check_folder, write_manifest
from raftune.store.files import (
    discard,
    dump_json,
    explaining,
    set_usual_mode,
    sha256_of,
    stage_file,
    sync,
    unique,
    write_json,
)
from raftune.store.parquet import read_groups, table_writer
from raftune.store.partial import unfinished_work
from raftune.store.run import RunFolder

CONFIG, DATA, ROWS, HELD_OUT, SKIPPED, REPORT = (
    *("config.yaml", "data.json", "rows.parquet", "held_out.parquet", "skipped.jsonl", "report.json"),
)
PARITY = "parity.json"
OURS = frozenset({"tmp", "LOCK"})  # what may lie there before config.yaml does


@dataclass(frozen=True)
class SftOutcome:
    """Result of supervised fine-tuning: its directory, its report, and whether anything was done."""

    root: Path
    report: Mapping[str, Any]
    worked: bool


def sft(config: SftConfig, observe: Callback = lambda kind, facts: None) -> SftOutcome:
    """Fine-tunes the configured model in its directory: begins, continues, or finds everything done.

    `observe` hears of "step" (name), "data" (the facts of data.json), "encoded" and "trained" (done, of). Raises
    ConfigChanged where the directory holds the work of another configuration or of other data; StoreError, DataError,
    ModelError.
    """
    folder = RunFolder(config.output_dir)
    refuse_foreign(folder.root)
    with folder.lock():
        write_config(folder, config)
        work = SftRun(folder, config, observe)
        worked = work.through()
    return SftOutcome(folder.root, json.loads((folder.root / REPORT).read_bytes()), worked)


class SftRun:
    """One directory's steps."""

    def __init__(self, folder: RunFolder, config: SftConfig, observe: Callback) -> None:
        self.root, self.tmp, self.config, self.observe = folder.root, folder.tmp, config, observe
        self.run = resolve_starters(as_run(config))
        self.family: Family = family_of(self.run)
        self.start, self.model = self.root / "start", self.root / "model"

    def through(self) -> bool:
        """Does the steps whose output is missing; whether there were any."""
        steps: list[tuple[str, Callable[[], None]]] = [
            ("start", self.begin),
            (DATA, self.gather),
            ("model", self.train),
            (REPORT, self.measure),
        ]
        refuse_other_data(self.root, self.config)
        missing = {name: step for name, step in steps if not (self.root / name).exists()}
        if missing:
            limit_threads(self.run)
        if missing and "start" not in missing:
            self.family.verify(self.start)
        if DATA in missing:  # what is wrong with the data is known before a large model is loaded
            self.observe("step", {"name": "read"})
            self.read()
        for name, step in missing.items():
            self.observe("step", {"name": name})
            step()
        discard(self.root / "train", self.tmp)
        return bool(missing)

    def policy(self, folder: Path) -> Policy:
        return self.family.load(self.run, check_folder(folder), self.start)

    # -- the steps ---------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """The answers, in memory until they are encoded."""
        data = self.config.data
        self.print = fingerprint(data.path)
        found = read_demonstrations(
            data.path, data.split, field="data.path", dialogues=data.dialogues, columns=data.columns
        )
        self.feedback = choose(found, data.min_score, data.keep, "data.path")

    def begin(self) -> None:
        """start/: the model, checked and written down."""
        staged = new_folder(self.tmp)
        start_policy(self.family, self.run, staged, final=self.start)
        publish_whole(staged, self.start)

    def gather(self) -> None:
        """data.json, last of what is read from the data."""
        data, feedback = self.config.data, self.feedback
        rows, notes = of_one_kind(feedback.rows[: data.limit])
        apart = held_out_prompts(rows, data.held_out_fraction)
        encoding = EncodedDemonstrations(self.policy(self.start), self.config.max_length)
        schema = rows_schema(rows, self.family.payload)
        learned = self.write(ROWS, encoding, [row for row in rows if name_of(row) not in apart], schema)
        refuse_nothing(learned, encoding.skipped)
        held_out = self.write(HELD_OUT, encoding, [row for row in rows if name_of(row) in apart], schema)
        write_prompts(self.tmp, self.root / ROWS, self.root / "prompts.jsonl")
        write_prompts(self.tmp, self.root / HELD_OUT, self.root / "held_out.jsonl", reference="reference")
        skipped = sorted([*feedback.skipped, *encoding.skipped], key=lambda one: one.row)
        with stage_file(self.tmp, self.root / SKIPPED) as staged:
            write_skipped(skipped, staged)
        counts = {"learned": learned, "held_out": held_out, "cut": encoding.cut}
        left_out = {"beyond_limit": len(feedback.rows) - len(rows)} if data.limit else {}
        facts = source_facts(feedback, skipped) | counts | left_out | {"notes": notes, "sha256": self.print}
        write_json(self.tmp, self.root / DATA, facts)
        self.observe("data", facts)

    def write(
        self, name: str, encoding: EncodedDemonstrations, rows: Sequence[Demonstration], schema: pa.Schema
    ) -> int:
        """Writes these rows as the policy reads them, and returns how many it could."""
        count = 0
        with stage_file(self.tmp, self.root / name) as staged, table_writer(staged, schema) as writer:
            for table in encoding.tables(rows, schema):
                writer.write_table(table)
                count += table.num_rows
                self.observe("encoded", {"done": count, "of": len(rows)})
        return count

    def train(self) -> None:
        """model/: the policy's own fit, continued from its checkpoints under train/."""
        fitted = new_folder(self.tmp)
        report = self.fit(fitted)
        if getattr(self.run.policy, "adapter", None) is not None:
            fitted = self.exported(fitted)
        dump_json(fitted / "training.json", asdict(report))
        write_manifest(fitted)
        publish_whole(fitted, self.model)

    def fit(self, out: Path) -> Any:
        """The report of the policy's training, which writes into `out`."""
        policy: Any = self.policy(self.start)
        told = {"callbacks": [step_teller(self.observe)]} if takes_callbacks(policy) else {}
        return policy.train(self.root / ROWS, self.root / "train", out, **told)

    def exported(self, fitted: Path) -> Path:
        """An adapter as peft loads it wherever it is, with its tokenizer: its base named in full."""
        policy: Any = self.policy(fitted)
        staged = new_folder(self.tmp)
        policy.export(staged)
        if (fitted / PARITY).is_file():  # what is measured next is checked against what was trained
            (fitted / PARITY).rename(staged / PARITY)
        discard(fitted, self.tmp)
        return staged

    def measure(self) -> None:
        """report.json: what was learned from what, and held-out perplexity before and after."""
        data = json.loads((self.root / DATA).read_bytes())
        training = json.loads((self.model / "training.json").read_bytes())
        losses = training.pop("losses")
        perplexity = self.perplexities()
        (self.model / PARITY).unlink(missing_ok=True)  # it holds tokens of the rows, and the model is to be given away
        files = [*(self.root / name for name in (ROWS, HELD_OUT, SKIPPED)), *sorted(self.model.iterdir())]
        report = {
            "model": "model",
            "start": self.config.policy.model_dump(mode="json").get("model"),
            "data": data,
            "training": training | dict(zip(("loss_first", "loss_last"), loss_ends(losses), strict=True)),
            "perplexity": perplexity,
            "sha256": {path.relative_to(self.root).as_posix(): sha256_of(path) for path in files if path.is_file()},
        }
        write_json(self.tmp, self.root / REPORT, report)

    def perplexities(self) -> dict[str, Any] | None:
        """exp of the mean nats per token of the held-out answers, EOS included; None where nothing can be measured."""
        tables = list(read_groups(self.root / HELD_OUT))
        held_out = pa.concat_tables(tables) if tables else None
        if held_out is None or not held_out.num_rows:
            return None
        ids = held_out.column("completion_ids").to_pylist() if "completion_ids" in held_out.column_names else []
        tokens = sum(map(len, ids)) or held_out.num_rows
        found: dict[str, Any] = {"answers": held_out.num_rows, "tokens": tokens}
        for when, folder in (("before", self.start), ("after", self.model)):
            nats = self.nats(folder, held_out)
            if nats is None:
                return None
            found[when] = round(math.exp(min(nats / tokens, 700.0)), 6)
        return found

    def nats(self, folder: Path, held_out: pa.Table) -> float | None:
        """The negative log-likelihood of all held-out answers; None for a policy that knows none."""
        policy = self.policy(folder)
        if not isinstance(policy, SupportsLogProbs):
            return None
        names = [name for name in ("prompt_id", "prompt", TOOLS) if name in held_out.column_names]
        prompts = [Prompt(row["prompt_id"], row["prompt"], row) for row in held_out.select(names).to_pylist()]
        size = self.config.training.per_device_train_batch_size
        while True:
            key = json.dumps([sha256_of(self.root / HELD_OUT), size])
            try:
                with unfinished_work(self.root / "train", self.tmp, folder.name, key, {}):
                    return -math.fsum(policy.log_probs(prompts, held_out, size))
            except OutOfMemory:
                if size == 1:
                    raise
                size //= 2


def as_run(config: SftConfig) -> RunConfig:
    """The configuration as a family knows it: that of a run with this policy and this training."""
    return RunConfig(
        seed=config.seed,
        data=DataConfig(prompts=config.data.path, split=config.data.split),
        policy=config.policy,
        sampling=SamplingConfig(
            chat_template_kwargs=config.chat_template_kwargs,
            diffusion=DiffusionSampling(**config.sampling.diffusion.model_dump()),
        ),
        training=SftTraining(**config.training.model_dump()),
        engine=EngineConfig(threads=config.threads),
    )


# -- the directory ---------------------------------------------------------------------------------------------------


def refuse_foreign(root: Path) -> None:
    """Raises StoreError where the directory holds something else."""
    if root.exists() and not root.is_dir():
        raise StoreError(f"output_dir must be a directory; {root} is a file. Choose another output_dir.")
    if (root / CONFIG).is_file():
        read_config(root / CONFIG)
        return
    if strangers := sorted(path.name for path in root.glob("*") if path.name not in OURS):
        raise StoreError(
            f"output_dir must be empty or hold an earlier `raftune sft`; {root} holds {', '.join(strangers[:3])}. "
            "Choose another output_dir."
        )


def write_config(folder: RunFolder, config: SftConfig) -> None:
    """Writes config.yaml, in full. Raises ConfigChanged where something was made under another configuration."""
    path, wanted = folder.root / CONFIG, config.model_dump(mode="json", exclude={"output_dir"})
    found = read_config(path).model_dump(mode="json", exclude={"output_dir"}) if path.is_file() else wanted
    changed = differences(found, wanted)
    if changed and (folder.root / DATA).exists():
        said = [f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in sorted(changed.items())]
        what = f"{folder.root} holds the work of another configuration:"
        raise ConfigChanged("\n".join([what, *said, "Choose another output_dir, or delete this one."]))
    if changed:  # the earlier call came to nothing
        discard(folder.root / "start", folder.tmp)
    if changed or not path.is_file():
        with stage_file(folder.tmp, path) as staged:
            staged.write_text(yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_config(path: Path) -> SftConfig:
    """The configuration that a directory was begun with. Raises StoreError where it is something else's."""
    try:
        return validate_as(SftConfig, {**read_yaml(path), "output_dir": str(path.parent)})
    except ConfigError as error:
        why = str(error).splitlines()[0]
        raise StoreError(
            f"output_dir must hold an earlier `raftune sft`, or nothing; {path} is not one's: {why}"
        ) from error


def refuse_other_data(root: Path, config: SftConfig) -> None:
    """Raises ConfigChanged where the data's file is not the one that the directory's rows were read from."""
    if not (root / DATA).is_file():
        return
    before, now = json.loads((root / DATA).read_bytes())["sha256"], fingerprint(config.data.path)
    if before and now and before != now:
        raise ConfigChanged(
            f"data.path: {config.data.path} has changed since {root} was begun (its SHA-256 was {before[:12]}, and is "
            f"{now[:12]}). Choose another output_dir, or put the file back."
        )


def fingerprint(source: str) -> str | None:
    """The SHA-256 of a file; None of what is no file."""
    path = Path(source).expanduser()
    return sha256_of(path) if path.is_file() else None


def new_folder(tmp: Path) -> Path:
    folder = unique(tmp)
    folder.mkdir()
    return folder


def publish_whole(staged: Path, final: Path) -> None:
    """Gives a finished folder its name in one rename, its contents durable before."""
    with explaining(staged, final):
        set_usual_mode(staged)
        sync(*sorted(path for path in staged.rglob("*") if path.is_file()), staged)
        staged.rename(final)
        sync(final.parent)


# -- the data --------------------------------------------------------------------------------------------------------


def source_facts(feedback: Feedback[Demonstration], skipped: Sequence[SkippedRow]) -> dict[str, Any]:
    """Where the rows are from, and how many were skipped for what."""
    reasons = dict(sorted(Counter(str(one.reason) for one in skipped).items()))
    used = len({one.row for one in feedback.rows} | {one.row for one in feedback.skipped})
    return {"source": feedback.source, "format": feedback.format, "rows": used, "skipped": reasons}


def refuse_nothing(learned: int, skipped: Sequence[SkippedRow]) -> None:
    """Raises DataError where no row is left to learn from."""
    if learned:
        return
    why = f" The model refuses {len(skipped):,}; row {skipped[0].row}: {skipped[0].detail}" if skipped else ""
    raise DataError(f"data.path must hold answers to learn from; none is left.{why}")


def write_prompts(tmp: Path, rows: Path, out: Path, reference: str | None = None) -> None:
    """Writes each prompt of the rows once, as JSON lines; under `reference`, its first answer that was not cut."""
    found: dict[str, dict[str, Any]] = {}
    for table in read_groups(rows):
        for row in table.to_pylist():
            tools = {TOOLS: row[TOOLS]} if row.get(TOOLS) is not None else {}
            line = found.setdefault(row["prompt_id"], {"prompt": row["prompt"], **tools})
            if reference is not None and not line.get(reference):
                answer = None if row.get("finish") == "length" else row["completion"]
                line[reference] = None if isinstance(answer, bytes) else answer  # an image lies in the rows alone
    with stage_file(tmp, out) as staged:
        staged.write_bytes(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in found.values()))


# -- progress --------------------------------------------------------------------------------------------------------


def takes_callbacks(policy: Any) -> bool:
    return "callbacks" in inspect.signature(policy.train).parameters


def step_teller(observe: Callback) -> Any:
    """A callback of transformers' Trainer that tells the observer of each optimizer step."""
    from transformers import TrainerCallback

    class Teller(TrainerCallback):  # type: ignore[misc]
        """Reports training progress."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            observe("trained", {"done": state.global_step, "of": state.max_steps})

    return Teller()
