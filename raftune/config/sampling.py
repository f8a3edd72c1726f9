"""The section `sampling`: how completions and images are generated, and from which sources."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from raftune.config.base import ConfigSection
from raftune.config.extensions import SPEC, code_hash, load_extension


class TeacherConfig(ConfigSection):
    """A second model whose answers are ranked beside the policy's own; it is loaded after the policy is freed."""

    model: str = Field(description="Folder or hub name of the teacher, of the policy's family.")
    num_generations: int = Field(1, ge=1, description="Answers the teacher gives to each prompt.")


class DiffusionSampling(ConfigSection):
    """How a pipeline is called: draw as the model will be used, since what is generated becomes the target."""

    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps; None is the pipeline's default.")
    guidance_scale: float | None = Field(
        None,
        ge=0,
        description="Classifier-free guidance; 1 is none, and what a round of training on its own images wants. None "
        "is the pipeline's default.",
    )
    height: int | None = Field(None, ge=1, description="Pixels; None is the pipeline's default.")
    width: int | None = Field(None, ge=1, description="Pixels; None is the pipeline's default.")
    negative_prompt: str | None = Field(None, description="What guidance moves away from, in place of no prompt.")
    pipeline_kwargs: dict[str, Any] = Field(default_factory=dict, description="Anything else that the pipeline takes.")


class SamplingConfig(ConfigSection):
    """The generation: K samples for each prompt, and how each token or step is chosen."""

    num_generations: int = Field(8, ge=1, description="K, the policy's own samples for each prompt.")
    temperature: float = Field(
        1.0, ge=0, description="Divides the logits; 0 is greedy. Below 1 it sharpens every round."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: the least set of tokens with this mass; 1 is off.")
    top_k: int = Field(0, ge=0, description="Only the k likeliest tokens; 0 is off.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drops tokens below this share of the likeliest; 0 is off.")
    repetition_penalty: float = Field(1.0, gt=0, description="Divides the logits of tokens already seen; 1 is off.")
    max_completion_length: int = Field(
        128, ge=1, description="Tokens generated at most; what is cut off never ends in EOS."
    )
    max_prompt_length: int | None = Field(
        None, ge=1, description="Prompts of more tokens are refused; None is the context's limit."
    )
    unusable_prompts: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Prompts that the model cannot take (too long, refused by its chat template): refuse names them "
        "before anything is generated, drop leaves them out and records which.",
    )
    backend: str = Field(
        "auto",
        pattern=f"^(auto|shared_prefix|hf_generate)$|{SPEC}",
        description="What generates: shared_prefix (prompts prefilled once), hf_generate, auto (the first of the two "
        "that a trial finds right), or a backend of your own (file.py:NAME, module:NAME).",
    )
    backend_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of a backend of your own, by name."
    )
    stop: tuple[str, ...] = Field((), description="Texts that end a completion once they appear in it.")
    generation_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Anything else that `generate` takes; the generation then goes through `generate`.",
    )
    system_prompt: str | None = Field(
        None,
        description="A system message, or a text and a blank line, put before prompts when generating; not when "
        "training.",
    )
    few_shot_prefix: str | None = Field(
        None, description="Text before a prompt given as text when generating, left out when training."
    )
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to the chat template.")
    diffusion: DiffusionSampling = Field(default_factory=DiffusionSampling, description="The options of a pipeline.")
    batch_size: int = Field(256, ge=1, description="Samples alive at once; halved, and recorded, when memory runs out.")
    chunk_size: int = Field(
        64, ge=1, description="Prompts in a chunk, the slice that is generated, scored and resumed whole."
    )
    candidate_columns: tuple[str, ...] = Field(
        (), description="Columns of the data set whose texts join the pool as candidates (human demonstrations)."
    )
    teacher: TeacherConfig | None = Field(None, description="Another model whose answers join the pool.")

    @model_validator(mode="after")
    def _options_have_a_backend(self) -> SamplingConfig:
        if self.backend_options and ":" not in self.backend:
            raise ValueError(
                f"backend_options are those of a backend of your own; got {self.backend_options} with backend "
                f"{self.backend!r}, which has none. Leave them out."
            )
        return self

    @model_validator(mode="after")
    def _stops_are_not_empty(self) -> SamplingConfig:
        if any(not text for text in self.stop):
            raise ValueError(
                "stop must hold non-empty texts; got ''. An empty text would end every completion at once: remove it."
            )
        return self

    @model_validator(mode="after")
    def _each_dial_has_one_place(self) -> SamplingConfig:
        fields = dict.fromkeys(type(self).model_fields) | {
            "num_return_sequences": "num_generations",
            "max_new_tokens": "max_completion_length",
            "stop_strings": "stop",
        }
        for name in self.generation_kwargs:
            if name in fields:
                raise ValueError(
                    f"generation_kwargs must not hold {name!r}: raftune sets it. Use sampling.{fields[name] or name}."
                )
        return self


# The dotted fields that shape what one policy draws.
DRAWN_BY = (
    "sampling.temperature",
    "sampling.top_p",
    "sampling.top_k",
    "sampling.min_p",
    "sampling.repetition_penalty",
    "sampling.max_completion_length",
    "sampling.backend",
    "sampling.backend_options",
    "sampling.stop",
    "sampling.generation_kwargs",
    "sampling.system_prompt",
    "sampling.few_shot_prefix",
    "sampling.chat_template_kwargs",
    "sampling.diffusion",
    "engine.threads",
)


def load_backend(config: SamplingConfig) -> Any:
    """The generation backend of the user's own (protocols.SamplingBackend); None where it is a built-in one.

    Raises ConfigError where it is not there, or is not whole.
    """
    if ":" not in config.backend:
        return None
    options, methods = config.backend_options, {"generate": ("model", "request")}
    return load_extension(
        config.backend,
        "sampling.backend",
        options,
        "sampling.backend_options",
        methods=methods,
        attributes=("reproducible",),
    )


def backend_code(config: SamplingConfig) -> dict[str, str]:
    """The hash of the file that a backend of the user's own is read from."""
    return {"backend's classes": code_hash(config.backend)} if ":" in config.backend else {}
