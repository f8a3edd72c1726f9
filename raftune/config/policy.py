"""The section `policy`: one class for each built-in family, and one for custom families."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from raftune.config.base import ConfigSection, tag_of


class AdapterConfig(ConfigSection):
    """LoRA by peft: only the adapter is trained and saved."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: float = Field(32.0, gt=0, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = Field("all-linear", description="Module names, or 'all-linear'.")
    modules_to_save: tuple[str, ...] = Field((), description="Modules that are trained and saved in full.")


class CausalLMPolicy(ConfigSection):
    """Any AutoModelForCausalLM."""

    family: Literal["causal_lm"] = Field("causal_lm", description="causal_lm, diffusion, tabular, or module:Class.")
    model: str = Field(description="Folder, hub name, or 'starter' for the bundled model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    tokenizer: str | None = Field(None, description="Folder or hub name, if it is not the model's own.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field("float32", description="Data type of the weights.")
    device: str = "auto"
    """auto, cpu, cuda or mps: one device; with several GPUs the first visible one."""
    adapter: AdapterConfig | None = Field(None, description="LoRA; none: all weights are trained.")
    load_in_4bit: bool = Field(False, description="QLoRA: 4-bit base weights; needs raftune[qlora], an adapter.")
    attn_implementation: str | None = Field(None, description="As in transformers; None: the model's default.")
    trust_remote_code: bool = Field(False, description="Run code from the model's repository. Read it first.")
    model_init_kwargs: dict[str, Any] = Field(default_factory=dict, description="Further arguments of from_pretrained.")

    @model_validator(mode="after")
    def _four_bits_need_an_adapter(self) -> CausalLMPolicy:
        if self.load_in_4bit and self.adapter is None:
            raise ValueError(
                "load_in_4bit must come with an adapter; got none. "
                "4-bit weights cannot be trained: add `adapter: {r: 16}`."
            )
        return self


class DiffusionPolicy(ConfigSection):
    """A diffusers pipeline of a supported architecture. Its denoiser is trained."""

    family: Literal["diffusion"] = "diffusion"
    model: str = Field(description="Folder or hub name of a pipeline; 'starter' or 'starter:flow' for a bundled one.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    variant: str | None = Field(None, description="Variant of the weight files, as in diffusers: fp16.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Data type of the weights.")
    device: str = "auto"
    """auto, cpu, cuda or mps: one device; with several GPUs the first visible one."""
    adapter: AdapterConfig | None = Field(None, description="LoRA; none: the whole denoiser is trained.")
    cpu_offload: bool = Field(False, description="Generate with one part of the pipeline on the GPU at a time (CUDA).")
    vae_slicing: bool = Field(False, description="The VAE takes one image at a time: less memory.")
    vae_tiling: bool = False
    """The VAE takes large images in overlapping tiles: less memory. Pixels change above its tile size."""
    pipeline_init_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of DiffusionPipeline.from_pretrained."""


class TabularPolicy(ConfigSection):
    """A categorical distribution for each prompt, for tests against closed forms."""

    family: Literal["tabular"] = "tabular"
    logits: tuple[tuple[float | None, ...], ...] | None = None
    """One row per prompt label, one logit per completion, null for an impossible one; None: all zero."""
    num_prompts: int = Field(1, ge=1, description="Number of rows, if no logits are given.")
    num_answers: int = Field(2, ge=2, description="Number of completions, if no logits are given.")
    step: float = Field(1.0, gt=0, le=1)
    """p becomes (1 - step)*p + step*q, where q is the distribution of kept samples."""


class CustomPolicy(ConfigSection):
    """A custom family: `module:Class` or `file.py:Class`. Its class validates the options."""

    family: str = Field(pattern=r".+:.+", description="module:Class or file.py:Class; see docs/families.md.")
    model: str | None = Field(None, description="The initial model, as the class reads it.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the class.")


PolicyConfig = Annotated[
    Annotated[CausalLMPolicy, Tag("causal_lm")]
    | Annotated[DiffusionPolicy, Tag("diffusion")]
    | Annotated[TabularPolicy, Tag("tabular")]
    | Annotated[CustomPolicy, Tag("custom")],
    Discriminator(tag_of("family", "causal_lm")),
]
