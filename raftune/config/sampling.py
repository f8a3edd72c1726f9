"""The section `sampling`: how completions and images are generated, and from which sources."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from raftune.config.base import ConfigSection
from raftune.config.extensions import SPEC, code_hash, load_extension

# The form {kind, options} of `backend` in the JSON schema.
BACKEND_SECTION: dict[str, Any] = {
    "type": ["string", "object"],
    "properties": {"kind": {"type": "string"}, "options": {"type": "object"}},
    "additionalProperties": False,
}


class TeacherConfig(ConfigSection):
    """A second model whose completions join the candidates. It is loaded after the policy is released."""

    model: str = Field(description="Folder or hub name of the teacher, of the policy's family.")
    num_generations: int = Field(1, ge=1, description="Completions of the teacher for each prompt.")


class DiffusionSampling(ConfigSection):
    """Arguments of the pipeline. Use the settings of later use, since the generated images are the training target."""

    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps; None: the pipeline's default.")
    guidance_scale: float | None = Field(None, ge=0)
    """Classifier-free guidance; 1 is off, and recommended for training on own images. None: the pipeline's default."""
    height: int | None = Field(None, ge=1, description="Pixels; None: the pipeline's default.")
    width: int | None = Field(None, ge=1, description="Pixels; None: the pipeline's default.")
    negative_prompt: str | None = Field(None, description="Negative prompt of the guidance.")
    pipeline_kwargs: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the pipeline.")


class SamplingConfig(ConfigSection):
    """Generation: K samples per prompt, and how each token or step is chosen."""

    num_generations: int = Field(8, ge=1, description="K: samples of the policy per prompt.")
    temperature: float = Field(1.0, ge=0)
    """Divides the logits; 0 is greedy. Values below 1 sharpen the policy every round."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: the smallest set of tokens with this mass; 1 is off."""
    top_k: int = Field(0, ge=0, description="Sample from the k most likely tokens; 0 is off.")
    min_p: float = Field(0.0, ge=0, le=1)
    """Drops tokens below this share of the most likely token's probability; 0 is off."""
    repetition_penalty: float = Field(1.0, gt=0, description="Divides the logits of tokens already seen; 1 is off.")
    max_completion_length: int = Field(128, ge=1)
    """Maximum number of generated tokens. A completion that is cut off has no EOS."""
    max_prompt_length: int | None = Field(None, ge=1)
    """Longer prompts are refused, in tokens; None: the model's context."""
    unusable_prompts: Literal["refuse", "drop"] = "refuse"
    """Prompts that the model cannot read (too long, refused by its chat template): refuse names them before generation,
    drop leaves them out and records them."""
    backend: str = Field(
        "auto", pattern=f"^(auto|shared_prefix|hf_generate)$|{SPEC}", json_schema_extra=BACKEND_SECTION
    )
    """shared_prefix (each prompt is computed once), hf_generate, auto (the first of the two that passes a parity
    check), or a custom backend (file.py:NAME, module:NAME)."""
    backend_options: dict[str, Any] = Field(default_factory=dict, description="Options of a custom backend.")
    stop: tuple[str, ...] = Field((), description="Texts that end a completion.")
    generation_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `generate`; the backend is then hf_generate."""
    system_prompt: str | None = None
    """System message, or a text and a blank line, before each prompt in generation; not in training."""
    few_shot_prefix: str | None = None
    """Text before each text prompt in generation; not in training."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the chat template.")
    diffusion: DiffusionSampling = Field(default_factory=DiffusionSampling)
    """Options of diffusion pipelines."""
    batch_size: int = Field(256, ge=1, description="Samples per batch; halved, and recorded, when memory runs out.")
    chunk_size: int = Field(64, ge=1)
    """Prompts per chunk, the slice that is generated, scored and resumed as a whole."""
    candidate_columns: tuple[str, ...] = ()
    """Columns of the data set whose texts join the candidates (human demonstrations)."""
    teacher: TeacherConfig | None = Field(None, description="A second model whose completions join the candidates.")

    @model_validator(mode="before")
    @classmethod
    def _backend_may_be_a_section(cls, value: Any) -> Any:
        backend = value.get("backend") if isinstance(value, dict) else None
        if not isinstance(backend, dict):
            return value
        if unknown := sorted(set(backend) - {"kind", "options"}):
            raise ValueError(f"sampling.backend.{unknown[0]} is not a field; there are kind, options.")
        return {**value, "backend": backend.get("kind", "auto"), "backend_options": backend.get("options", {})}

    @model_validator(mode="after")
    def _options_are_used(self) -> SamplingConfig:
        if self.backend_options and ":" not in self.backend:
            raise ValueError(
                f"backend_options are those of a backend of your own; got {self.backend_options} with backend "
                f"{self.backend!r}, which has none. Leave them out."
            )
        if "" in self.stop:
            raise ValueError(
                "stop must hold non-empty texts; got ''. An empty text would end every completion at once: remove it."
            )
        renamed = {"num_return_sequences": "num_generations", "max_new_tokens": "max_completion_length"}
        for name in self.generation_kwargs:
            field = (renamed | {"stop_strings": "stop"}).get(name, name)
            if field in type(self).model_fields:
                raise ValueError(f"generation_kwargs must not hold {name!r}: raftune sets it. Use sampling.{field}.")
        return self


# The dotted fields that change what a policy generates.
DRAWN_BY = (
    *("sampling.temperature", "sampling.top_p", "sampling.top_k", "sampling.min_p", "sampling.repetition_penalty"),
    *("sampling.max_completion_length", "sampling.backend", "sampling.backend_options", "sampling.stop"),
    *("sampling.generation_kwargs", "sampling.system_prompt", "sampling.few_shot_prefix"),
    *("sampling.chat_template_kwargs", "sampling.diffusion", "engine.threads"),
)


def load_backend(config: SamplingConfig) -> Any:
    """The custom generation backend (protocols.SamplingBackend); None for a built-in one.

    Raises ConfigError if it cannot be loaded or lacks a method.
    """
    if ":" not in config.backend:
        return None
    return load_extension(
        config.backend,
        "sampling.backend",
        config.backend_options,
        "sampling.backend_options",
        methods={"generate": ("model", "request")},
        attributes=("reproducible",),
    )


def backend_code(config: SamplingConfig) -> dict[str, str]:
    """The hash of the file that a custom backend is read from."""
    return {"backend's classes": code_hash(config.backend)} if ":" in config.backend else {}
