"""The causal-LM policy: any AutoModelForCausalLM."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback

from raftune.arrays import FloatArray
from raftune.config.sampling import SamplingConfig, load_backend
from raftune.config.training import SHARING
from raftune.data.classifier_inputs import writes_date
from raftune.errors import ConfigError, DataError
from raftune.policies.causal_lm import loading
from raftune.policies.causal_lm.encoding import TextEncoder, keep_date, read_date
from raftune.policies.causal_lm.footprint import ModelFootprint
from raftune.policies.causal_lm.likelihood import TokenizedCompletion, log_probs
from raftune.policies.causal_lm.loading import model_usage, write_model
from raftune.policies.causal_lm.mismatch import generated_round, mismatch, recorded_rows
from raftune.policies.causal_lm.sampling.backend import BackendChoice, choose_backend, generate, generate_by, replay
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.parity import check_parity
from raftune.policies.causal_lm.sampling.server import Servers, check_servers, servers_of
from raftune.policies.causal_lm.sampling.shared_prefix import prefix_log_probs
from raftune.policies.causal_lm.sampling.token_choice import (
    SHARED_PREFIX,
    BackendName,
    GeneratedCompletion,
    SamplingParams,
)
from raftune.policies.causal_lm.sampling.vllm import ServedModel
from raftune.policies.causal_lm.weight_probe import (
    WeightProbe,
    measure,
    plain_log_probs,
    probe_of_fit,
    probe_rows,
    read_probe,
    rows_of_prompts,
)
from raftune.policies.model_files import ADAPTER, REFERENCE, publish_files, read_optimizer, rounding_note
from raftune.policies.unsupported import FamilyConfig, refuse_unused
from raftune.protocols import Chunk, GenerationRequest, ModelUsage, TrainReport
from raftune.records import Prompt, Sample, derive_seed
from raftune.store.commit import NAME as COMMIT
from raftune.store.files import sha256_hex, sha256_of
from raftune.training.devices import choose_device, names_out_of_memory
from raftune.training.objectives import load_objective, objective_code

PAYLOAD = pa.schema(
    [
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_ids", pa.list_(pa.int32())),
        pa.field("completion_logprobs", pa.list_(pa.float32())),
        pa.field("finish", pa.string()),
    ]
)

COMPARED = 8  # completions of a custom backend, whose log-probabilities are compared with a forward's
NOTABLE = 0.05  # nats a token
WITHOUT_TEMPLATE = (
    "the model has a chat template, and prompts given as text go in without it: write them as lists of messages, "
    '[{"role": "user", "content": …}], to use it'
)


class CausalLM:
    """A language model read from a committed folder: the tokenizer at once, the weights when first needed.

    The instance that generates is never the one that was trained: training loads one of its own and lets it go.
    """

    media = "text"
    payload = PAYLOAD
    any_objective = uses_trainer = True
    parallel = frozenset({"ddp", "fsdp"})
    footprint = ModelFootprint

    def __init__(self, config: FamilyConfig, folder: Path, start: Path) -> None:
        self.config, self.folder, self.start_folder = config, folder, start
        policy, sampling = config.policy, config.sampling
        self.device = choose_device(policy.device)
        facts = loading.start_facts(policy, start)
        self.tokenizer, self.eos_ids = facts.tokenizer, facts.eos_ids
        self._notes: dict[str, None] = dict.fromkeys(facts.notes)
        date = read_date(start) if writes_date(self.tokenizer) else None
        if date is not None:
            self._notes[f"the chat template writes the date: in this run it is always {date}"] = None
        limit = loading.context(facts.config)
        dtype = policy.dtype if policy.dtype != "auto" else str(facts.config.dtype).removeprefix("torch.")
        self._notes |= rounding_note(config, dtype)
        self.encoder = TextEncoder(self.tokenizer, sampling, limit, self.eos_ids[0], date)
        if (end := self.encoder.turn_end) is not None and end.token_id not in self.eos_ids:
            self.eos_ids = (*self.eos_ids, end.token_id)
        defaults = facts.generation
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        differs = [name for name in names if defaults.get(name) not in (None, getattr(sampling, name))]
        if differs:
            model_values = ", ".join(f"{name} {defaults[name]:g}" for name in differs)
            values = ", ".join(f"{name} {getattr(sampling, name):g}" for name in differs)
            note = "of the model's generation_config only its ends of text are used: it says"
            self._notes[f"{note} {model_values}; sampling says {values}"] = None
        self._model: Any = None
        self._backend: BackendChoice | None = None
        self._recorded = False  # whether the choice is the run's: scoring must not depend on what was generated before
        self._checked: set[BackendName] = set()
        self._servers: Servers | None = None
        self._server: dict[str, Any] | None = None  # the record of the run's servers, where these generate
        self._auto = ""  # why `auto` takes servers, or does not
        self._custom_backend = load_backend(sampling) if isinstance(sampling, SamplingConfig) else None
        self._compared = False

    @classmethod
    def load(cls, config: FamilyConfig, folder: Path, start: Path) -> CausalLM:
        """The policy of a committed model folder; `start` is the initial model folder, on which adapters rest."""
        return cls(config, folder, start)

    @classmethod
    def start(cls, config: FamilyConfig, out: Path, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
        """Writes the initial model into `out` and returns its facts; raises ModelError where it is unfit."""
        check_unused(config)
        out.mkdir(parents=True, exist_ok=True)
        trains = getattr(config, "num_rounds", 1) > 0
        facts = loading.write_start(config.policy, out, model, tokenizer, merge=trains)
        tokenizer = loading.load_tokenizer(config.policy, out)
        if writes_date(tokenizer):  # the date has to be the same tomorrow, and in an evaluation of this run
            tokenizer.save_pretrained(out)
            keep_date(out, config.policy.tokenizer, config.policy.model)
        return facts

    @classmethod
    def section_at(cls, policy: Mapping[str, Any], folder: Path, start: Path) -> dict[str, Any]:
        """The `policy` section of a run that starts from this committed folder of a run with this initial model."""
        tokenizer = {"tokenizer": str(start)} if (start / "tokenizer_config.json").is_file() else {}
        model = {} if (folder / REFERENCE).is_file() else {"model": str(folder), "revision": None}
        return {**policy, **tokenizer, **model}

    def check_config(self) -> None:
        check_unused(self.config)

    @classmethod
    def verify(cls, start: Path) -> None:
        """Raises ModelError if the model that the start folder refers to is gone or has changed."""
        loading.verify(start)

    @property
    def model(self) -> Any:
        """The weights on the device, in eval mode, read on first use. Raises ModelError unless training had them."""
        if self._model is None:
            if self._servers is not None:
                self._servers.release()
            model = loading.load_round(self.config.policy, self.folder, self.start_folder, self.device)
            if (probe := read_probe(self.folder)) is not None:
                check_parity(probe, plain_log_probs(model, probe.examples, self._pad_id), "as it was loaded")
            self._model = model
        return self._model

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory; 0 before they are read."""
        return 0 if self._model is None else sum(weight.nbytes for weight in self._model.parameters())

    def generate(self, chunk: Chunk) -> list[Sample]:
        """All samples of the chunk, prompt by prompt, k ascending. Raises DataError, ModelError, OutOfMemory."""
        if self.tokenizer.chat_template and any(isinstance(prompt.content, str) for prompt in chunk.prompts):
            self._notes[WITHOUT_TEMPLATE] = None
        prompts = self.encoder.encode(chunk.prompts, for_drawing=True)
        settings = self._settings(chunk.batch_size)
        if self._custom_backend is not None:
            groups = self._generate_custom(GenerationRequest(prompts, chunk.seeds, settings, self.tokenizer))
        elif self._server is not None:
            groups = self._generate_served(prompts, chunk.seeds, settings)
        else:
            path = self._path(settings, prompts)
            groups = generate(self.model, self.tokenizer, prompts, chunk.seeds, settings, path)
        texts = iter(self.encoder.decode([completion.ids for group in groups for completion in group]))
        return [
            Sample(
                id=chunk.sample_id(prompt, k),
                prompt_id=prompt.id,
                k=k,
                source="policy",
                seed=seed,
                version=chunk.version,
                completion=next(texts),
                payload={"completion_ids": ids, "completion_logprobs": logprobs, "finish": finish},
            )
            for prompt, seeds, group in zip(chunk.prompts, chunk.seeds, groups, strict=True)
            for k, (seed, (ids, logprobs, finish)) in enumerate(zip(seeds, group, strict=True))
        ]

    def _generate_custom(self, request: GenerationRequest) -> list[list[GeneratedCompletion]]:
        """By a custom backend; the first completions' log-probabilities are compared with a forward's."""
        backend, name = self._custom_backend, self.config.sampling.backend
        groups = generate_by(backend, name, self.model, request)
        if not backend.reproducible:
            self._notes[f"{name} does not promise equal completions for equal seeds: a repeated sample differs"] = None
        pairs = zip(request.prompts, groups, strict=True)
        first = [(prompt, completion) for prompt, group in pairs for completion in group][:COMPARED]
        if first and not self._compared:
            examples = [TokenizedCompletion.of(prompt, completion.ids) for prompt, completion in first]
            plain = np.concatenate(plain_log_probs(self.model, examples, self._pad_id))
            distance = np.abs(plain - np.concatenate([completion.logprobs for _, completion in first])).mean()
            if distance > NOTABLE:
                self._notes[f"log-probabilities of {name} are {distance:.2g} nats a token from the model's own"] = None
        self._compared = True
        return groups

    def _generate_served(
        self, prompts: list[list[int]], seeds: Sequence[Sequence[int]], settings: SamplingParams
    ) -> list[list[GeneratedCompletion]]:
        """By the run's servers, after they have shown that they serve this policy."""
        servers, record = self._servers, self._server
        if servers is None or record is None:
            raise ConfigError(
                "sampling.backend: this run generates through a server, and none was given. Generate in the run itself."
            )
        if not servers.stay:
            self._drop_model()  # a server on the same GPU needs its memory
        restarts = servers.restarts
        batch = CompletionBatch(self.tokenizer, prompts, seeds, settings, servers.context)
        if batch.rows:
            servers.check_identity(record)
            servers.fill(batch, self._served_model(), self._weight_probe(record))
        if servers.restarts > restarts:
            self._notes[f"the server died and was started again {servers.restarts} times so far"] = None
        return batch.completions()

    def _drop_model(self) -> None:
        """Frees the weights; they are read again when they are needed."""
        if self._model is not None:
            self._model = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _served_model(self) -> ServedModel:
        """The model of this folder, as a server loads it."""
        config, folder, start = self.config.policy, self.folder.resolve(), self.start_folder.resolve()
        adapter = folder if (folder / ADAPTER).is_file() else None
        whole = adapter is None and folder != start and not (folder / REFERENCE).is_file()
        source, revision = (str(folder), None) if whole else loading.source(start)
        tokenizer = config.tokenizer or (source if Path(source) != folder else loading.source(start)[0])
        if (start / "tokenizer_config.json").is_file():
            tokenizer = str(start)
        commit = folder / COMMIT
        version = (sha256_of(commit) if commit.is_file() else sha256_hex([str(folder)]))[:16]
        tied = loading.model_config(config, start).get_text_config().tie_word_embeddings
        return ServedModel(source, revision, tokenizer, adapter, version, bool(tied))

    def _weight_probe(self, record: Mapping[str, Any]) -> WeightProbe:
        """The probe of this folder's weights; that of the initial model is in the run's record."""
        probe = read_probe(self.folder)
        return WeightProbe(**record["probe"]) if probe is None else probe

    def use_servers(self, servers: Servers) -> None:
        """Generates through these servers where the run's record says so."""
        self._servers = servers

    @classmethod
    def check_servers(cls, config: Any) -> None:
        """Raises ConfigError or EngineError where the configured servers cannot be used."""
        check_servers(config)

    @classmethod
    def servers(cls, config: Any, start: Path, tmp: Path) -> Servers | None:
        """The servers that the configuration names, or may choose; none is started or asked yet."""
        return servers_of(config, start, tmp)

    def _settings(self, batch_size: int) -> SamplingParams:
        sampling = self.config.sampling
        names = "temperature top_p top_k min_p repetition_penalty max_completion_length generation_kwargs"
        return SamplingParams(
            **{name: getattr(sampling, name) for name in names.split()},
            stop_strings=sampling.stop,
            eos_ids=self.eos_ids,
            pad_id=self.tokenizer.pad_token_id,
            batch_size=batch_size,
        )

    def choose_backend(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """How a run on such prompts generates, for the record: decided once, by trial on a few of them."""
        if self._custom_backend is not None:
            exact = {} if self._custom_backend.reproducible else {"reproducible": False}
            return {"own": self.config.sampling.backend, **exact}
        settings = self._settings(self.config.sampling.batch_size or 8)
        with names_out_of_memory(settings.batch_size, "max_completion_length"):
            rows = rows_of_prompts(self.encoder.encode(prompts, for_drawing=True))
            name = self.config.sampling.backend
            self._backend, self._recorded = choose_backend(self.model, rows, settings, name), True
            if self._servers is not None:
                served, self._auto = self._servers.chosen()
                if served:
                    probe = measure(self.model, rows, self._pad_id)
                    self._drop_model()
                    self._server = self._servers.begin(self._served_model(), probe)
        return self.backend() or {}

    def backend(self) -> dict[str, Any] | None:
        """The record of how this policy generates; None before the trial."""
        if self._backend is None:
            return None
        server = {"server": self._server} if self._server is not None else {}
        return asdict(self._backend) | server | ({"auto": self._auto} if self._auto else {})

    def use_backend(self, record: Mapping[str, Any]) -> None:
        """From now on this policy generates as `choose_backend` found for its run."""
        if "own" not in record:
            names = [field.name for field in fields(BackendChoice)]
            self._backend = BackendChoice(**{name: record[name] for name in names if name in record})
            self._recorded, self._server, self._auto = True, record.get("server"), record.get("auto", "")

    def _path(self, settings: SamplingParams, prompts: Sequence[Sequence[int]]) -> BackendName:
        """How this chunk is generated; each backend's parity with the trained model is checked once."""
        with names_out_of_memory(settings.batch_size, "max_completion_length"):
            if self._backend is None:
                name = self.config.sampling.backend
                self._backend = choose_backend(self.model, rows_of_prompts(prompts), settings, name)
            path, reason = self._backend.path(self.model, settings, max(map(len, prompts)))
            if self.config.sampling.backend == "shared_prefix" and path not in SHARED_PREFIX:
                raise ConfigError(f"sampling.backend: shared_prefix cannot be used here: {reason}. Write auto.")
            if path not in self._checked and (probe := read_probe(self.folder)) is not None:
                how = "through the shared-prefix cache" if path in SHARED_PREFIX else "through `generate`"
                check_parity(probe, replay(path, self.model, probe, settings), how)
            self._checked.add(path)
        if path not in SHARED_PREFIX:
            self._notes[f"generated through `generate`, slower than the shared cache: {reason}"] = None
        return path

    def unread(self, prompt: Prompt) -> None:
        """Raises DataError for a prompt that cannot be taken, to generate or to train, or whose candidates cannot."""
        self._check_prompts([prompt])

    def reads_all(self, prompts: Sequence[Prompt]) -> bool:
        try:
            self._check_prompts(prompts)
        except DataError:
            return False
        return True

    def _check_prompts(self, prompts: Sequence[Prompt]) -> None:
        sampling = self.config.sampling
        self.encoder.encode(prompts, for_drawing=True)
        if sampling.system_prompt or sampling.few_shot_prefix:
            self.encoder.encode(prompts, for_drawing=False)
        for prompt, column in itertools.product(prompts, sampling.candidate_columns):
            if column in prompt.columns:
                try:
                    self.encoder.encode_answer(prompt, prompt.columns[column])
                except DataError as error:
                    raise DataError(f"sampling.candidate_columns, {column!r} of prompt {prompt.id}: {error}") from error

    def encode_completion(self, prompt: Prompt, answer: Any, source: str) -> Mapping[str, Any]:
        """The payload of a given completion: its ids as this tokenizer gives them, EOS at the end, no log-probs."""
        text, ids = self.encoder.encode_answer(prompt, answer)
        return {"completion": text, "completion_ids": ids, "completion_logprobs": None, "finish": "eos"}

    def encode_truncated(
        self, prompt: Prompt, answer: Any, source: str, max_length: int | None = None
    ) -> Mapping[str, Any]:
        """As `encode_completion`, cut to `max_length` (with the prompt) or the context: finish `length` then."""
        text, ids, cut = self.encoder.encode_within(prompt, answer, max_length)
        finish = "length" if cut else "eos"
        return {"completion": text, "completion_ids": ids, "completion_logprobs": None, "finish": finish}

    def log_probs(self, prompts: Sequence[Prompt], samples: pa.Table, batch_size: int) -> FloatArray:
        """(N,) nats of row i of `samples`, which answers prompts[i] as put when generating; EOS included."""
        distinct = {prompt.id: prompt for prompt in prompts}
        encoded = dict(zip(distinct, self.encoder.encode([*distinct.values()], for_drawing=True), strict=True))
        completions = samples.column("completion_ids").to_pylist()
        examples = [TokenizedCompletion.of(encoded[p.id], ids) for p, ids in zip(prompts, completions, strict=True)]
        # Prompts are computed once where some have several completions, and the run's record says that this is right.
        if self._backend is not None and self._recorded:
            several = len({example.ids[: example.start].tobytes() for example in examples}) < len(examples)
            if several and self._backend.scores_by_prefix(self.model, max(len(example.ids) for example in examples)):
                return prefix_log_probs(self.model, examples, batch_size)
        return log_probs(self.model, examples, batch_size, self._pad_id)

    def recorded_log_probs(self, samples: pa.Table) -> FloatArray:
        """(N,) sums of the log-probabilities recorded while generating; NaN where there are none."""
        rows = samples.column("completion_logprobs").to_pylist()
        return np.array([np.nan if row is None else math.fsum(row) for row in rows], dtype=np.float64)

    def train(self, rows: Path, work: Path, out: Path, callbacks: Sequence[TrainerCallback] = ()) -> TrainReport:
        """Trains on the rows and writes the new model into `out`; resumes from `work`. As Policy.train."""
        from raftune.policies.causal_lm.sft_loss import batch_of, loss_of, read_rows
        from raftune.training.checkpoints import identity
        from raftune.training.fit import FitTask, fit
        from raftune.training.processes import current

        self._model = None  # one large model at a time
        if self._servers is not None:
            self._servers.release()
        policy, training = self.config.policy, self.config.training
        data = read_rows(rows, self.encoder, training)
        seed, adapter_seed = derive_seed(self.config.seed, "tune", data.round), derive_seed(self.config.seed, "adapter")
        settings = training.model_dump_json(exclude={*SHARING}) + "".join(objective_code(training).values())
        probed, before = probe_rows(data.examples), list[list[float]]()
        recorded, measured = recorded_rows(rows, self.encoder, self.folder), dict[str, Any]()

        def load(device: torch.device) -> Any:
            model = loading.load_round(policy, self.folder, self.start_folder, device, adapter_seed)
            # Before any checkpoint is read into it. With start_from: start, it is not the model of the round before.
            if current().first and not before and generated_round(self.folder, data.round):
                before[:] = plain_log_probs(model, probed, self._pad_id)
                measured.update(mismatch(model, recorded, self.folder, self._pad_id))
            return model

        task = FitTask(
            load=load,
            rows=data.rows,
            lengths=[len(example.ids) for example in data.examples],
            collate=lambda batch: batch_of(batch, self.tokenizer.pad_token_id),
            objective=loss_of(load_objective(training), getattr(training, "objective", "sft")),
            seed=seed,
            identity=identity(rows, settings, seed),
            carried=read_optimizer(self.folder) if training.optimizer_state == "carried" else None,
            callbacks=callbacks,
        )
        fitted = fit(task, training, work, self.device)
        write_model(fitted.model, self.tokenizer, out, loading.base_of_adapters(self.start_folder), fitted.optimizer)
        plain = extract_model_from_parallel(fitted.model, keep_fp32_wrapper=False)  # without autocast in its forward
        probe_of_fit(plain, probed, before, self._pad_id).write(out)
        self._notes |= dict.fromkeys(fitted.notes)
        tokens = sum(example.tokens for example in data.examples)
        details = {"tokens": tokens, "left_out_truncated": data.truncated}
        return fitted.report(len(data.examples), details | ({"mismatch": measured} if measured else {}))

    def mismatch(self, rows: Path) -> Mapping[str, Any]:
        """How far the log-probs recorded in these training rows are from this model's, if it generated them."""
        if self._servers is not None:
            self._servers.release()
        return mismatch(self.model, recorded_rows(rows, self.encoder, self.folder), self.folder, self._pad_id)

    @classmethod
    def publish(
        cls, config: FamilyConfig, folder: Path, start: Path, out: Path, base: str | None, merged: bool
    ) -> ModelUsage:
        """Copies a committed model with its tokenizer, or merges its adapter; as SupportsPublishing."""
        if merged:
            return model_usage(False, cls.load(config, folder, start).export_merged(out))
        return model_usage(publish_files(folder, start, out, config.policy.tokenizer).library == "peft")

    def export(self, out: Path) -> None:
        """Writes this policy's model so that plain transformers or peft loads it from `out`, wherever that is."""
        model = loading.load_round(self.config.policy, self.folder, self.start_folder, self.device, merge=False)
        name, revision = loading.source(self.start_folder)
        local = Path(name).is_dir()
        write_model(model, self.tokenizer, out, (str(Path(name).resolve()) if local else name, revision))
        self.tokenizer.save_pretrained(out)

    def export_merged(self, out: Path) -> str:
        """Writes a plain model into `out`, the adapter added in, and returns what its card says of that.

        Added in float32; rounded to the run's dtype only where that keeps what the adapter learned.
        """
        policy, probe = self.config.policy, read_probe(self.folder)
        if not (self.folder / ADAPTER).is_file():
            raise ConfigError(f"--merged needs a round with a LoRA adapter; {self.folder} has none. Leave it out.")
        if policy.load_in_4bit:
            raise ConfigError(
                "--merged needs a base in full precision; this run's is in 4 bits, and an adapter trained on those is "
                "another model on others. Leave it out: peft loads the adapter on its base."
            )
        exact = policy.model_copy(update={"dtype": "float32"})
        model = loading.load_round(exact, self.folder, self.start_folder, torch.device("cpu"))
        dtype = getattr(torch, probe.dtype) if probe is not None and probe.merge else torch.float32
        model = model.to(dtype)
        if probe is not None:
            check_parity(probe, plain_log_probs(model, probe.examples, self._pad_id), "merged")
        write_model(model, self.tokenizer, out, ("", None))
        self.tokenizer.save_pretrained(out)
        tied = loading.model_config(policy, self.start_folder).get_text_config().tie_word_embeddings
        parts = [f"The LoRA adapter is merged into its base: these are whole weights, in {str(model.dtype)[6:]}."]
        if dtype == torch.float32 and probe is not None and probe.dtype != "float32":
            parts.append(f"Rounded to the run's {probe.dtype}, they would lose part of what the adapter learned.")
        if tied and not model.config.get_text_config().tie_word_embeddings:
            parts.append("Embedding and output layer share a weight in the base; here each has its own.")
        return " ".join(parts)

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how this policy was loaded, generated and was trained, each once."""
        return tuple(self._notes)


def check_unused(config: FamilyConfig) -> None:
    """Raises ConfigError for options of images, which mean nothing to texts."""
    refuse_unused(config, "causal_lm", ("sampling.diffusion", "training.diffusion", "keep_latents"))
