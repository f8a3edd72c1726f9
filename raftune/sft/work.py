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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config.run import DataConfig, EngineConfig, RunConfig
from raftune.config.sampling import DiffusionSampling, SamplingConfig
from raftune.config.sft import SftConfig
from raftune.config.training import SHARING, SftTraining
from raftune.data.feedback import choose, read_demonstrations
from raftune.data.rows import Demonstration, SkippedRow, write_skipped
from raftune.errors import ConfigChanged, ConfigError, DataError, OutOfMemory, TooLong
from raftune.policies.registry import family_of, start_policy
from raftune.protocols import Callback, Policy, SupportsLogProbs, SupportsTruncation
from raftune.records import TOOLS, JsonType, Prompt, derive_seed, prompt_ids, table_of
from raftune.results.summary import loss_ends
from raftune.runtime.assembly import limit_threads
from raftune.runtime.distributed import check_processes, trainer_for
from raftune.starters.resolve import resolve_starters
from raftune.store.committed import check_folder, write_manifest
from raftune.store.files import discard, dump_json, publish_directory, sha256_of, stage_file, unique, write_json
from raftune.store.parquet import read_groups, table_writer
from raftune.store.partial import unfinished_work
from raftune.store.run import RunFolder
from raftune.store.training_folder import DATA, HELD_OUT, REPORT, SKIPPED, open_training

ROWS, PARITY = "rows.parquet", "parity.json"
WITHOUT_EFFECT = frozenset({"output_dir", *(f"training.{name}" for name in SHARING)})
ENCODED_AT_ONCE = 1024
MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])


@dataclass(frozen=True)
class SftOutcome:
    """Result of supervised fine-tuning: its directory, its report, and whether anything was done."""

    root: Path
    report: Mapping[str, Any]
    worked: bool


def sft(config: SftConfig, observe: Callback = lambda kind, facts: None) -> SftOutcome:
    """Fine-tunes the configured model in its directory. Resumes if the work was interrupted.

    `observe` is called with "step" (name), "data" (the facts of data.json), "encoded" and "trained" (done, of). Raises
    ConfigChanged where the directory holds the work of another configuration or of other data; StoreError, DataError,
    ModelError.
    """

    def has_work(root: Path) -> bool:
        return (root / DATA).exists()

    options: Any = {"has_work": has_work, "stale": ("start",), "without_effect": WITHOUT_EFFECT}
    with open_training(config, "raftune sft", **options) as folder:
        worked = SftRun(folder, config, observe).work()
    return SftOutcome(folder.root, json.loads((folder.root / REPORT).read_bytes()), worked)


class SftRun:
    """One directory's steps."""

    def __init__(self, folder: RunFolder, config: SftConfig, observe: Callback) -> None:
        self.root, self.tmp, self.config, self.observe = folder.root, folder.tmp, config, observe
        self.run = resolve_starters(as_run(config))
        self.family = family_of(self.run)
        self.start, self.model = self.root / "start", self.root / "model"
        source = Path(config.data.path).expanduser()
        self.sha256 = sha256_of(source) if source.is_file() else None

    def work(self) -> bool:
        """Does the steps whose output is missing; whether there were any."""
        if (self.root / DATA).is_file():
            earlier = json.loads((self.root / DATA).read_bytes())["sha256"]
            if earlier and self.sha256 and earlier != self.sha256:
                raise ConfigChanged(
                    f"data.path: {self.config.data.path} has changed since {self.root} was started (its SHA-256 was "
                    f"{earlier[:12]}, and is {self.sha256[:12]}). Choose another output_dir, or put the file back."
                )
        steps: dict[str, Callable[[], None]] = {
            "start": self.write_start,
            DATA: self.encode_data,
            "model": self.train,
            REPORT: self.write_report,
        }
        missing = {name: step for name, step in steps.items() if not (self.root / name).exists()}
        if "model" in missing and (faults := [*check_processes(self.run, self.family)]):
            raise ConfigError("\n".join(faults))
        if missing:
            limit_threads(self.run)
        if missing and "start" not in missing:
            self.family.verify(self.start)
        if DATA in missing:  # faults of the data are reported before a large model is loaded
            self.observe("step", {"name": "read"})
            data = self.config.data
            rows = read_demonstrations(
                data.path, data.split, field="data.path", dialogues=data.dialogues, columns=data.columns
            )
            self.feedback = choose(rows, data.min_score, data.keep, "data.path")
        for name, step in missing.items():
            self.observe("step", {"name": name})
            step()
        discard(self.root / "train", self.tmp)
        return bool(missing)

    def policy(self, folder: Path) -> Policy:
        return self.family.load(self.run, check_folder(folder), self.start)

    def write_start(self) -> None:
        """start/: the model, checked and written down."""
        staged = self.new_folder()
        start_policy(self.family, self.run, staged, final=self.start)
        publish_directory(staged, self.start)

    def encode_data(self) -> None:
        """data.json, last of what is read from the data."""
        data, feedback = self.config.data, self.feedback
        rows, notes = of_one_kind(feedback.rows[: data.limit])
        held_out = held_out_prompts(rows, data.held_out_fraction)
        sides = {
            ROWS: [row for row in rows if prompt_id(row) not in held_out],
            HELD_OUT: [row for row in rows if prompt_id(row) in held_out],
        }
        policy, schema = self.policy(self.start), rows_schema(rows, self.family.payload)
        counts: dict[str, int] = {}
        refused: list[SkippedRow] = []
        cut = 0
        for name, side in sides.items():
            counts[name], skipped, cut_here = self.write_rows(name, side, policy, schema)
            refused += skipped
            cut += cut_here
            if not counts[ROWS]:
                first = refused[0] if refused else None
                why = f" The model refuses {len(refused):,}; row {first.row}: {first.detail}" if first else ""
                raise DataError(f"data.path must hold completions to learn from; none is left.{why}")
        self.write_prompts(ROWS, "prompts.jsonl", None)
        self.write_prompts(HELD_OUT, "held_out.jsonl", "reference")
        all_skipped = sorted([*feedback.skipped, *refused], key=lambda row: row.row)
        with stage_file(self.tmp, self.root / SKIPPED) as staged:
            write_skipped(all_skipped, staged)
        facts = {
            "source": feedback.source,
            "format": feedback.format,
            "rows": len({row.row for row in feedback.rows} | {row.row for row in feedback.skipped}),
            "skipped": dict(sorted(Counter(str(row.reason) for row in all_skipped).items())),
            "learned": counts[ROWS],
            "held_out": counts[HELD_OUT],
            "cut": cut,
            **({"beyond_limit": len(feedback.rows) - len(rows)} if data.limit else {}),
            "notes": notes,
            "sha256": self.sha256,
        }
        write_json(self.tmp, self.root / DATA, facts)
        self.observe("data", facts)

    def write_rows(
        self, name: str, rows: Sequence[Demonstration], policy: Policy, schema: pa.Schema
    ) -> tuple[int, list[SkippedRow], int]:
        """Writes these rows as the policy reads them; how many, those that it cannot read, and how many it cut."""
        count = cut = 0
        skipped: list[SkippedRow] = []
        with stage_file(self.tmp, self.root / name) as staged, table_writer(staged, schema) as writer:
            for first in range(0, len(rows), ENCODED_AT_ONCE):
                part = [
                    encode_row(row, policy, self.config.max_length) for row in rows[first : first + ENCODED_AT_ONCE]
                ]
                encoded = [row for row in part if isinstance(row, dict)]
                skipped += [row for row in part if isinstance(row, SkippedRow)]
                cut += sum(row.get("finish") == "length" for row in encoded)
                writer.write_table(table_of(encoded, schema))
                count += len(encoded)
                self.observe("encoded", {"done": count, "of": len(rows)})
        return count, skipped, cut

    def write_prompts(self, rows: str, out: str, reference: str | None) -> None:
        """Writes each prompt once, as JSON lines; under `reference`, its first completion that was not cut."""
        lines: dict[str, dict[str, Any]] = {}
        for table in read_groups(self.root / rows):
            for row in table.to_pylist():
                tools = {TOOLS: row[TOOLS]} if row.get(TOOLS) is not None else {}
                line = lines.setdefault(row["prompt_id"], {"prompt": row["prompt"], **tools})
                if reference is not None and not line.get(reference):
                    answer = None if row.get("finish") == "length" else row["completion"]
                    line[reference] = None if isinstance(answer, bytes) else answer  # an image lies in the rows alone
        with stage_file(self.tmp, self.root / out) as staged:
            staged.write_bytes(
                b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines.values())
            )

    def train(self) -> None:
        """model/: the policy's own training, resumed from its checkpoints under train/."""
        trained, paths = self.new_folder(), (self.root / ROWS, self.root / "train")
        policy: Any

        def progress(done: int, of: int) -> None:
            self.observe("trained", {"done": done, "of": of})

        if (several := trainer_for(self.run, self.start, progress)) is not None:
            report, _ = several(check_folder(self.start), *paths, trained)
        else:
            policy = self.policy(self.start)
            takes_callbacks = "callbacks" in inspect.signature(policy.train).parameters
            options = {"callbacks": [_step_callback(self.observe)]} if takes_callbacks else {}
            report = policy.train(*paths, trained, **options)
        if getattr(self.run.policy, "adapter", None) is not None:  # exported, so that peft loads it from anywhere
            exported = self.new_folder()
            policy = self.policy(trained)
            policy.export(exported)
            if (trained / PARITY).is_file():  # what is measured next is checked against what was trained
                (trained / PARITY).rename(exported / PARITY)
            discard(trained, self.tmp)
            trained = exported
        dump_json(trained / "training.json", asdict(report))
        write_manifest(trained)
        publish_directory(trained, self.model)

    def write_report(self) -> None:
        """report.json: data, training, and held-out perplexity before and after."""
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
        """exp of the mean nats per token of held-out completions, EOS included; None where nothing can be measured."""
        tables = list(read_groups(self.root / HELD_OUT))
        held_out = pa.concat_tables(tables) if tables else None
        if held_out is None or not held_out.num_rows:
            return None
        ids = held_out.column("completion_ids").to_pylist() if "completion_ids" in held_out.column_names else []
        tokens = sum(map(len, ids)) or held_out.num_rows
        names = [name for name in ("prompt_id", "prompt", TOOLS) if name in held_out.column_names]
        prompts = [Prompt(row["prompt_id"], row["prompt"], row) for row in held_out.select(names).to_pylist()]
        perplexity: dict[str, Any] = {"answers": held_out.num_rows, "tokens": tokens}
        for when, folder in (("before", self.start), ("after", self.model)):
            policy, size = self.policy(folder), self.config.training.per_device_train_batch_size
            if not isinstance(policy, SupportsLogProbs):
                return None
            while when not in perplexity:
                key = json.dumps([sha256_of(self.root / HELD_OUT), size])
                try:
                    with unfinished_work(self.root / "train", self.tmp, folder.name, key, {}):
                        nats = -math.fsum(policy.log_probs(prompts, held_out, size))
                except OutOfMemory:
                    if size == 1:
                        raise
                    size //= 2
                else:
                    perplexity[when] = round(math.exp(min(nats / tokens, 700.0)), 6)
        return perplexity

    def new_folder(self) -> Path:
        folder = unique(self.tmp)
        folder.mkdir()
        return folder


def as_run(config: SftConfig) -> RunConfig:
    """The configuration of a run with this policy and this training, which families take."""
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


def _step_callback(observe: Callback) -> Any:
    """A callback of transformers' Trainer that reports each optimizer step."""
    from transformers import TrainerCallback

    class StepReporter(TrainerCallback):  # type: ignore[misc]
        """Reports training progress."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            observe("trained", {"done": state.global_step, "of": state.max_steps})

    return StepReporter()


def prompt_id(row: Demonstration) -> str:
    """The prompt's id: equal prompts have one, with tools only where those are equal too."""
    content: Any = row.prompt if row.tools is None else [row.prompt, row.tools]
    return prompt_ids([content])[0]


def held_out_prompts(rows: Sequence[Demonstration], fraction: float) -> frozenset[str]:
    """The ids of the share of prompts that is held out: those with the lowest hashes, whatever the order of rows."""
    ids = {prompt_id(row) for row in rows}
    ordered = sorted(ids, key=lambda name: (derive_seed("hold out", name.rsplit("-", 1)[0]), name))
    return frozenset(ordered[: int(len(ordered) * fraction)])


def of_one_kind(rows: Sequence[Demonstration]) -> tuple[list[Demonstration], list[str]]:
    """The rows with prompts of one kind, which one column needs: beside messages, a text becomes a user's message."""
    texts = sum(isinstance(row.prompt, str) for row in rows)
    if texts in (0, len(rows)) or any(isinstance(row.prompt, int) for row in rows):
        return list(rows), []
    note = f"{texts:,} of {len(rows):,} prompts are texts and became a user's message, since the others are messages"
    converted = []
    for row in rows:
        if isinstance(row.prompt, str):
            answer = [{"role": "assistant", "content": row.completion}]
            row = replace(row, prompt=[{"role": "user", "content": row.prompt}], completion=answer)
        converted.append(row)
    return converted, [note]


def rows_schema(rows: Sequence[Demonstration], payload: pa.Schema) -> pa.Schema:
    """The columns of rows.parquet, as a round's training reads them."""
    plain = all(m.keys() == {"role", "content"} for row in rows if isinstance(row.prompt, list) for m in row.prompt)
    if any(isinstance(row.prompt, list) for row in rows):
        prompt = pa.list_(MESSAGE) if plain else JsonType()
    else:
        prompt = pa.int64() if any(isinstance(row.prompt, int) for row in rows) else pa.string()
    fields = [
        *(pa.field(name, pa.string(), nullable=False) for name in ("sample_id", "prompt_id")),
        pa.field("prompt", prompt, nullable=False),
        *([pa.field(TOOLS, JsonType())] if any(row.tools is not None for row in rows) else []),
        pa.field("weight", pa.float64(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("origin", "source")),
    ]
    return pa.schema([*fields, *payload], metadata={"raftune.round": "0"})


def encode_row(row: Demonstration, policy: Policy, max_length: int | None) -> dict[str, Any] | SkippedRow:
    """One row of rows.parquet, cut to what fits where the policy can do that; a skipped row where it cannot read it."""
    try:
        content, answer = (_as_text(part) if isinstance(part, list) else part for part in (row.prompt, row.completion))
        prompt = Prompt(prompt_id(row), content, {} if row.tools is None else {TOOLS: row.tools})
        if isinstance(policy, SupportsTruncation):
            payload = policy.encode_truncated(prompt, answer, "human", max_length)
        else:
            payload = policy.encode_completion(prompt, answer, "human")
    except TooLong as error:
        return SkippedRow(row.row, "prompt too long", str(error))
    except DataError as error:
        return SkippedRow(row.row, "unfit for this model", str(error))
    names = {"sample_id": f"data/{row.row}", "prompt_id": prompt.id, "prompt": prompt.content, **prompt.columns}
    return {**names, "weight": 1.0, "origin": "data", "source": "human", **payload}


def _as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with contents in parts joined. Raises DataError for images, which would be lost."""
    joined = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
                raise DataError(f"a message must have a text; the {message['role']}'s content has other parts")
            content = "".join(map(str, texts))
        joined.append({**message, "content": content})
    return joined
