"""The diffusion policy: any diffusers pipeline with a pipeline adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import TrainerCallback

from raftune.config.policy import DiffusionPolicy
from raftune.errors import ConfigError
from raftune.policies.diffusion import loading, references
from raftune.policies.diffusion import start as starting
from raftune.policies.diffusion.call_args import call_of, is_guided
from raftune.policies.diffusion.components import INDEX
from raftune.policies.diffusion.encode_image import adopted
from raftune.policies.diffusion.encoding import PromptEncoder
from raftune.policies.diffusion.footprint import PipelineSize
from raftune.policies.diffusion.latents import FIELDS
from raftune.policies.diffusion.pipelines import adapter_of
from raftune.policies.diffusion.pipelines.base import PipelineAdapter, PipelineCall
from raftune.policies.diffusion.sample import generate
from raftune.policies.diffusion.trainable import refuse_untunable
from raftune.policies.unsupported import FamilyConfig, all_but, refuse_unused
from raftune.protocols import Chunk, ModelUsage, TrainReport
from raftune.records import INVALID, Prompt, Sample
from raftune.sanitize import counted
from raftune.training.devices import choose_device

PAYLOAD = pa.schema(
    [
        pa.field("completion", pa.binary()),
        pa.field("image_sha256", pa.string()),
        pa.field(INVALID, pa.string()),
        *FIELDS,
    ]
)
READ = ("num_generations", "diffusion", "batch_size", "chunk_size", "candidate_columns", "teacher")


class Diffusion:
    """A pipeline whose denoiser is read from a committed folder when first needed; its frozen parts are shared.

    The instance that draws is never the one that was trained: training loads a denoiser of its own and lets it go.
    """

    media = "image"
    payload = PAYLOAD
    uses_trainer = True
    footprint = PipelineSize

    def __init__(self, config: FamilyConfig, folder: Path, start: Path) -> None:
        self.config, self.folder, self.start_folder = config, folder, start
        self.device = choose_device(config.policy.device)
        self.frozen = loading.load_pipeline(config.policy, start)
        self._drawer: PipelineAdapter | None = None
        self._notes: dict[str, None] = {}

    @classmethod
    def load(cls, config: FamilyConfig, folder: Path, start: Path) -> Diffusion:
        """The policy of a committed model folder; `start` is the initial model folder, on which every round rests."""
        return cls(config, folder, start)

    @classmethod
    def start(cls, config: FamilyConfig, out: Path, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
        """Writes the start pipeline into `out` and says what it is.

        Raises ModelError where it is unfit: parts missing, an architecture or a scheduler that cannot be trained here,
        weights that are not finite, a binding that fails the oracle. Raises ConfigError for options that mean nothing.
        """
        assert isinstance(config.policy, DiffusionPolicy)
        refuse_unread(config)
        choose_device(config.policy.device)
        out.mkdir(parents=True, exist_ok=True)
        tunes = getattr(config, "num_rounds", 1) > 0
        starting.begin(config.policy, out, model, tunes=tunes)
        return cls(config, out, out).facts(tunes=tunes)

    @classmethod
    def section_at(cls, policy: Mapping[str, Any], folder: Path, start: Path) -> dict[str, Any]:
        """The `policy` section, made that of a run which begins from this committed folder of a run with this start."""
        if references.read_record(folder).kind == "reference":
            return dict(policy)
        return {**policy, "model": str(folder), "revision": None}

    @classmethod
    def describe_samples(cls, config: FamilyConfig, count: int) -> str:
        """So many images, with their steps and guidance where these are configured."""
        options = config.sampling.diffusion
        steps = [] if options.num_inference_steps is None else [counted(options.num_inference_steps, "step")]
        guidance = [] if options.guidance_scale is None else [f"guidance {options.guidance_scale:g}"]
        return ", ".join([counted(count, "image"), *steps, *guidance])

    def check_config(self) -> None:
        """Raises ConfigError for options that the family or this pipeline does not have; needs no weights."""
        refuse_unread(self.config)
        shape = self.latents_shape  # asked in any case: a size that the pipeline cannot draw is refused
        if getattr(self.config, "num_rounds", 1) > 0:
            refuse_untunable(self.config, self.blank, shape)

    @classmethod
    def verify(cls, start: Path) -> None:
        """Raises ModelError if the pipeline that the start folder refers to is gone or has changed."""
        references.verify(start)

    def facts(self, *, tunes: bool) -> dict[str, Any]:
        """What the start is, for the record and for planning. Raises ModelError, ConfigError where it is unfit."""
        from raftune.policies.diffusion.parity import refuse_unproven, refuse_unseeded

        self.check_config()  # needs no weights, so a large model is not read in vain
        call, pipe = self.call, self.frozen.pipe
        denoiser = self.drawer.denoiser
        loading.refuse_not_finite({**self.frozen.modules, self.frozen.denoiser.name: denoiser})
        with self.frozen.on(self.device, "vae", "text_encoder", "safety_checker"):
            (refuse_unproven if tunes else refuse_unseeded)(self.drawer, call.kwargs)
        return {
            "architecture": type(pipe).__name__,
            "denoiser": type(denoiser).__name__,
            "parameters": sum(weight.numel() for weight in denoiser.parameters()),
            "frozen_bytes": self.frozen.nbytes,
            "dtype": self.config.policy.dtype,
            "scheduler": type(pipe.scheduler).__name__,
            "height": call.height,
            "width": call.width,
            "num_inference_steps": call.num_inference_steps,
            "guidance_scale": call.guidance_scale,
            "forwards_per_step": 2 if is_guided(self.blank, call) else 1,
            "latents_shape": list(self.latents_shape),
            "model": self.config.policy.model,
            "notes": [],
        }

    # -- what is held --------------------------------------------------------------------------------------------------

    @property
    def shared(self) -> loading.FrozenComponents:
        """What all rounds of this start have in common: who holds it spares the next one the reading."""
        return self.frozen

    @cached_property
    def blank(self) -> PipelineAdapter:
        """The binding without the denoiser's weights: it encodes prompts and images, and knows sizes."""
        return self.bound(None)

    @property
    def drawer(self) -> PipelineAdapter:
        """The binding with this folder's denoiser, on the device; read on first use."""
        if self._drawer is None:
            denoiser = loading.load_denoiser(self.config.policy, self.folder, self.start_folder, train=False)
            self._drawer = self.bound(denoiser)
        return self._drawer

    def bound(self, denoiser: Any) -> PipelineAdapter:
        """The binding over the pipeline with this denoiser; None: with one that has no weights."""
        pipe = self.frozen.pipe if denoiser is None else self.frozen.with_denoiser(denoiser)
        return adapter_of(pipe, self.config.sampling.diffusion.pipeline_kwargs)

    @cached_property
    def call(self) -> PipelineCall:
        """How the pipeline is called in this run."""
        return call_of(self.blank, self.config.sampling.diffusion)

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of this run's images."""
        return self.blank.latent_shape(self.call.height, self.call.width)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Reads prompts, each distinct one once for all rounds."""
        return PromptEncoder(self.frozen, self.blank, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory, the frozen parts among them; 0 before any are read."""
        return self.frozen.nbytes + (0 if self._drawer is None else loading.nbytes_of(self._drawer.denoiser))

    def unread(self, prompt: Prompt) -> str | None:
        """The end of the prompt that no text encoder reads; None where one reads it all.

        Raises DataError for a prompt that this architecture does not take.
        """
        self.blank.refuse_prompts([prompt.content])
        return self.encoder.unseen(prompt.content) if isinstance(prompt.content, str) else None

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate(self, chunk: Chunk) -> list[Sample]:
        """All samples of the chunk, prompt by prompt, k ascending. Raises DataError, ModelError, OutOfMemory.

        Evaluation units have no latents: nothing is ever trained on them.
        """
        order = [(i, k) for i, seeds in enumerate(chunk.seeds) for k in range(len(seeds))]
        conditions = self.encoder.encode(chunk.prompts).take([i for i, _ in order])
        seeds = [chunk.seeds[i][k] for i, k in order]
        payloads = self._payloads(conditions, seeds, chunk)
        return [
            Sample(
                id=chunk.sample_id(chunk.prompts[i], k),
                prompt_id=chunk.prompts[i].id,
                k=k,
                source="policy",
                seed=chunk.seeds[i][k],
                version=chunk.version,
                completion=payload.pop("completion"),
                payload=payload,
            )
            for (i, k), payload in zip(order, payloads, strict=True)
        ]

    def _payloads(self, conditions: Any, seeds: Sequence[int], chunk: Chunk) -> list[dict[str, Any]]:
        call = self.call
        negative = None
        if is_guided(self.blank, call):
            negative = self.encoder.empty(self.config.sampling.diffusion.negative_prompt)
        denoiser = self.drawer.denoiser
        with self.frozen.on(self.device, "vae", "safety_checker"):
            return generate(
                lambda: self.bound(denoiser),
                conditions,
                negative,
                seeds,
                call,
                chunk.batch_size,
                self.device,
                with_latents=chunk.learned,
            )

    def encode_completion(self, prompt: Prompt, answer: Any, source: str) -> Mapping[str, Any]:
        """The payload of somebody else's image: its PNG, and its latents as the VAE gives them.

        `answer` is an image of the run's size: PNG or JPEG bytes, a PIL image, a path, or a mapping of `bytes` and
        `path` as `datasets` has it. A teacher's draw that came to nothing is taken over as such. Raises DataError.
        """
        with self.frozen.on(self.device, "vae"):
            return adopted(self.blank, prompt, answer, source, (self.call.height, self.call.width))

    # -- learning ------------------------------------------------------------------------------------------------------

    def train(self, rows: Path, work: Path, out: Path, callbacks: Sequence[TrainerCallback] = ()) -> TrainReport:
        """Fits the denoiser to the rows and writes the new model into `out`; continues from what lies in `work`.

        Raises DataError for rows that cannot be used, ModelError for what is not finite, OutOfMemory.
        """
        from raftune.policies.diffusion.fit import train

        self._drawer = None  # one large model at a time
        report, notes = train(self, rows, work, out, callbacks)
        self._notes |= dict.fromkeys(notes)
        return report

    @classmethod
    def publish(
        cls, config: FamilyConfig, folder: Path, start: Path, out: Path, base: str | None, merged: bool
    ) -> ModelUsage:
        """Writes a whole pipeline, or a LoRA alone; its base where only the run or this package has that."""
        from raftune.policies.diffusion.saving import model_usage

        if merged:
            raise ConfigError(f"--merged is for language models with LoRA; {folder} holds another kind. Leave it out.")
        policy = cls.load(config, folder, start)
        policy.export(out)
        if not (out / INDEX).is_file() and (base is None or references.read_record(start).kind != "reference"):
            base = "FOLDER/base"
            cls.load(config, start, start).export(out / "base")
        return model_usage(policy.blank, policy.call, config.sampling.diffusion.negative_prompt, out, base)

    def export(self, out: Path) -> None:
        """Writes this policy's model so that plain diffusers loads it from `out`, wherever that is."""
        from raftune.policies.diffusion.saving import export

        denoiser = loading.load_denoiser(self.config.policy, self.folder, self.start_folder, train=True)
        binding = self.bound(denoiser)
        export(binding.pipe, binding, out)

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how this policy was trained, each once."""
        return tuple(self._notes)


def refuse_unread(config: FamilyConfig) -> None:
    """Raises ConfigError for options of text that mean nothing to images."""
    unread = [*all_but(config.sampling, "sampling", READ), "training.mask_truncated_completions"]
    refuse_unused(config, "diffusion", unread)


__all__ = ["PAYLOAD", "Diffusion"]
