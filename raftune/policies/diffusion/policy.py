"""The diffusion policy: any diffusers pipeline with a pipeline adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from raftune.config.policy import DiffusionPolicy
from raftune.errors import ConfigError
from raftune.policies.diffusion import loading, model_folder
from raftune.policies.diffusion.checks import call_of, check_trainable, is_guided
from raftune.policies.diffusion.footprint import PipelineSize
from raftune.policies.diffusion.images import PAYLOAD, encode_image, generate
from raftune.policies.diffusion.pipelines import adapter_of
from raftune.policies.diffusion.pipelines.base import PipelineAdapter, PipelineCall
from raftune.policies.model_files import check_finite, rounding_note
from raftune.policies.unsupported import FamilyConfig, all_but, refuse_unused
from raftune.protocols import Chunk, ModelUsage, TrainReport
from raftune.records import Prompt, Sample
from raftune.sanitize import counted
from raftune.training.devices import choose_device

READ = ("num_generations", "diffusion", "batch_size", "chunk_size", "candidate_columns", "teacher")


class Diffusion:
    """A pipeline whose denoiser is read from a committed folder when first needed; its frozen parts are shared.

    The instance that generates is never the one that was trained: training loads a denoiser of its own.
    """

    media = "image"
    payload = PAYLOAD
    uses_trainer = True
    parallel = frozenset({"ddp", "fsdp"})
    footprint = PipelineSize

    def __init__(self, config: FamilyConfig, folder: Path, start: Path) -> None:
        self.config, self.folder, self.start_folder = config, folder, start
        self.device = choose_device(config.policy.device)
        self.frozen = loading.load_pipeline(config.policy, start)
        self._sampler: PipelineAdapter | None = None
        self._notes = rounding_note(config, config.policy.dtype)

    @classmethod
    def load(cls, config: FamilyConfig, folder: Path, start: Path) -> Diffusion:
        """The policy of a committed model folder; `start` is the initial model's folder."""
        return cls(config, folder, start)

    @classmethod
    def start(cls, config: FamilyConfig, out: Path, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
        """Writes the start pipeline into `out` and returns its facts; raises ModelError where it is unfit."""
        from raftune.policies.diffusion.parity import check_parity, check_seeds

        assert isinstance(config.policy, DiffusionPolicy)
        check_unused(config)
        choose_device(config.policy.device)
        out.mkdir(parents=True, exist_ok=True)
        trains = getattr(config, "num_rounds", 1) > 0
        loading.write_start(config.policy, out, model, trains=trains)
        policy = cls(config, out, out)
        policy.check_offload()
        policy.check_config()  # needs no weights, so a large model is not read in vain
        frozen, denoiser = policy.frozen, policy.sampler.denoiser
        for name, module in {**frozen.modules, frozen.denoiser.name: denoiser}.items():
            check_finite(module, f"{name}/")
        if config.policy.cpu_offload:  # the parts may not fit together: they are checked on the CPU
            denoiser.to("cpu")
        with frozen.on(denoiser.device, "vae", "text_encoder", "safety_checker"):
            (check_parity if trains else check_seeds)(policy.sampler, policy.call.kwargs)
        return {
            "architecture": type(frozen.pipe).__name__,
            "parameters": sum(weight.numel() for weight in denoiser.parameters()),
            "frozen_bytes": frozen.nbytes,
            "forwards_per_step": 2 if is_guided(policy.blank, policy.call) else 1,
            "latents_shape": list(policy.latents_shape),
        }

    @classmethod
    def section_at(cls, policy: Mapping[str, Any], folder: Path, start: Path) -> dict[str, Any]:
        """The `policy` section of a run that starts from this committed folder of a run with this start."""
        if model_folder.read_record(folder).kind == "reference":
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
        check_unused(self.config)
        shape = self.latents_shape  # checks the size in any case
        if getattr(self.config, "num_rounds", 1) > 0:
            check_trainable(self.config, self.blank, shape)

    @classmethod
    def verify(cls, start: Path) -> None:
        """Raises ModelError if the pipeline that the start folder refers to is gone or has changed."""
        model_folder.verify(start)

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def shared(self) -> loading.FrozenComponents:
        """The parts that all rounds share; a caller that holds them keeps them loaded."""
        return self.frozen

    @cached_property
    def blank(self) -> PipelineAdapter:
        """The adapter without the denoiser's weights: it encodes prompts and images, and knows sizes."""
        return self.bound(None)

    @property
    def sampler(self) -> PipelineAdapter:
        """The adapter with this folder's denoiser, on the device; read on first use."""
        if self._sampler is None:
            denoiser = loading.load_denoiser(self.config.policy, self.folder, self.start_folder, train=False)
            self._sampler = self.bound(denoiser)
        return self._sampler

    def bound(self, denoiser: Any) -> PipelineAdapter:
        """The adapter of the pipeline with this denoiser; None: with one that has no weights."""
        pipe = self.frozen.pipe if denoiser is None else self.frozen.with_denoiser(denoiser)
        return adapter_of(pipe, self.config.sampling.diffusion.pipeline_kwargs)

    @cached_property
    def call(self) -> PipelineCall:
        """The options of the pipeline's call in this run."""
        return call_of(self.blank, self.config.sampling.diffusion)

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of this run's images."""
        return self.blank.latent_shape(self.call.height, self.call.width)

    @cached_property
    def encoder(self) -> loading.PromptEncoder:
        """Reads prompts, each distinct one once for all rounds."""
        return loading.PromptEncoder(self.frozen, self.blank, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory, the frozen parts among them; 0 before any are read."""
        return self.frozen.nbytes + (0 if self._sampler is None else loading.nbytes_of(self._sampler.denoiser))

    def unread(self, prompt: Prompt) -> str | None:
        """The end of the prompt that no text encoder reads, if any. Raises DataError for a prompt of another kind."""
        self.blank.check_prompts([prompt.content])
        return self.encoder.unseen(prompt.content) if isinstance(prompt.content, str) else None

    def check_offload(self) -> None:
        """Raises ConfigError for policy.cpu_offload where there is no GPU to take parts from."""
        if self.config.policy.cpu_offload and self.device.type != "cuda":
            raise ConfigError(
                f"policy.cpu_offload needs a CUDA device, whose memory it saves; got {self.device}. Leave it out."
            )

    @contextmanager
    def placed(self, denoiser: Any) -> Iterator[Callable[[], PipelineAdapter]]:
        """Within, calls of the pipeline with this denoiser run on the device; yields what makes its adapter. With
        policy.cpu_offload each part is there while it is used alone."""
        if not self.config.policy.cpu_offload:
            with self.frozen.on(self.device, "vae", "safety_checker"):
                yield lambda: self.bound(denoiser)
            return
        self.check_offload()
        adapter = self.bound(denoiser)
        adapter.pipe.enable_model_cpu_offload(device=self.device)
        try:
            yield lambda: adapter
        finally:
            adapter.pipe.maybe_free_model_hooks()
            adapter.pipe.remove_all_hooks()  # the VAE's would hold the denoiser, and later rounds share the VAE

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate(self, chunk: Chunk) -> list[Sample]:
        """All samples of the chunk, prompt by prompt, k ascending. Raises DataError, ModelError, OutOfMemory.

        Evaluation units have no latents: nothing is ever trained on them.
        """
        order = [(i, k) for i, seeds in enumerate(chunk.seeds) for k in range(len(seeds))]
        call, negative = self.call, None
        conditions = self.encoder.encode(chunk.prompts).take([i for i, _ in order])
        if is_guided(self.blank, call):
            negative = self.encoder.empty(self.config.sampling.diffusion.negative_prompt)
        denoiser = self.sampler.denoiser  # read after the prompts, which may be refused
        with self.placed(denoiser) as bound:
            payloads = generate(
                bound,
                conditions,
                negative,
                [chunk.seeds[i][k] for i, k in order],
                call,
                chunk.batch_size,
                self.device,
                with_latents=chunk.learned,
            )
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

    def encode_completion(self, prompt: Prompt, answer: Any, source: str) -> Mapping[str, Any]:
        """The payload of a given image: its PNG, and its latents as the VAE encodes them.

        `answer` is an image of the run's size: PNG or JPEG bytes, a PIL image, a path, or a mapping of `bytes` and
        `path` as `datasets` has it; None is a teacher's sample without an image. Raises DataError.
        """
        with self.frozen.on(self.device, "vae"):
            return encode_image(self.blank, prompt, answer, source, (self.call.height, self.call.width))

    # -- training ------------------------------------------------------------------------------------------------------

    def train(self, rows: Path, work: Path, out: Path, callbacks: Sequence[TrainerCallback] = ()) -> TrainReport:
        """Trains on the rows and writes the new model into `out`; resumes from `work`. As Policy.train."""
        from raftune.policies.diffusion.training import train

        self._sampler = None  # one large model at a time
        report, notes = train(self, rows, work, out, callbacks)
        self._notes |= dict.fromkeys(notes)
        return report

    @classmethod
    def publish(
        cls, config: FamilyConfig, folder: Path, start: Path, out: Path, base: str | None, merged: bool
    ) -> ModelUsage:
        """Writes a whole pipeline, or a LoRA alone; its base where only the run or this package has that."""
        if merged:
            raise ConfigError(f"--merged is for language models with LoRA; {folder} holds another kind. Leave it out.")
        policy = cls.load(config, folder, start)
        policy.export(out)
        is_pipeline = (out / model_folder.INDEX).is_file()
        if not is_pipeline and (base is None or model_folder.read_record(start).kind != "reference"):
            base = "FOLDER/base"
            cls.load(config, start, start).export(out / "base")
        return loading.model_usage(policy.blank, policy.call, config.sampling.diffusion.negative_prompt, out, base)

    def export(self, out: Path) -> None:
        """Writes this policy's model so that plain diffusers loads it from `out`, wherever that is."""
        denoiser = loading.load_denoiser(self.config.policy, self.folder, self.start_folder, train=True)
        adapter = self.bound(denoiser)
        loading.write_weights(adapter, out, out, adapter.pipe)

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how this policy was trained, each once."""
        return tuple(self._notes)


def check_unused(config: FamilyConfig) -> None:
    """Raises ConfigError for options of text."""
    unread = [*all_but(config.sampling, "sampling", READ), "training.mask_truncated_completions"]
    refuse_unused(config, "diffusion", unread)


__all__ = ["PAYLOAD", "Diffusion"]
