"""The section `sampling`: how completions and images are generated, and from which sources."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from raftune.config.base import ConfigSection, OneOrMore
from raftune.config.extensions import SPEC, code_hash, load_extension

# Flags of vLLM that raftune sets, without which its servers would not be what the run needs.
VLLM_FLAGS = {
    *("--model", "--tokenizer", "--host", "--port", "--uds", "--served-model-name", "--dtype", "--revision"),
    *("--generation-config", "--logprobs-mode", "--enable-lora", "--max-lora-rank", "--max-loras", "--lora-modules"),
    *("--api-key", "--trust-remote-code", "--gpu-memory-utilization", "--seed"),
}


class ServerBackend(ConfigSection):
    """Options of `sampling.backend` with `kind: openai`: servers that run already, whose weights others change."""

    url: Annotated[tuple[str, ...], OneOrMore()] = ()
    """Addresses; each serves the same model, and prompts are spread over them. ${NAME} reads the environment."""
    model: str | None = Field(None, description="The model's name at /v1/models; None: the only one there.")
    key_env: str | None = Field(None, description="Environment variable that holds the key of the servers.")
    update: tuple[str, ...] = ()
    """Command that makes the servers serve a round's model; {folder} in it is the model's folder, {name} its name."""
    reproducible: bool = False
    """Whether a seed gives the same bytes in any batch; a trial that finds otherwise is an error."""
    concurrency: int = Field(256, ge=1, description="Requests at once to each server.")
    timeout: float = Field(600.0, gt=0, description="Seconds for one completion before it is tried again.")
    retries: int = Field(3, ge=0, description="Further tries of a request that timed out, broke off or got a 5xx.")


class VllmBackend(ServerBackend):
    """Options of `sampling.backend` with `kind: vllm`, and of `auto`, which may choose it: a vLLM that raftune starts,
    or, with `url`, ones that run already."""

    python: str | None = Field(None, description="Python of the environment that has vLLM; None: raftune's own.")
    args: tuple[str, ...] = Field((), description="Further arguments of vLLM's server: [--tensor-parallel-size, '2'].")
    gpu_memory: float = Field(0.9, gt=0, le=1, description="Share of the GPU's memory that vLLM takes.")
    keep_alive: bool | None = None
    """Whether the server stays while other models are loaded and trained. None: on a CPU only; on a GPU it is ended
    before, as they need its memory."""
    startup_timeout: float = Field(900.0, gt=0, description="Seconds in which the server has to be ready.")


# The built-in backends that have options, each with their class.
SERVERS: dict[str, type[ServerBackend]] = {"openai": ServerBackend, "vllm": VllmBackend, "auto": VllmBackend}

# The forms {kind, options} and {kind, the options of a server} of `backend` in the JSON schema.
_OPTIONS = VllmBackend.model_json_schema()["properties"]
BACKEND_SECTION: dict[str, Any] = {
    "type": ["string", "object"],
    "properties": {"kind": {"type": "string"}, "options": {"type": "object"}, **_OPTIONS},
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
        "auto", pattern=f"^(auto|shared_prefix|hf_generate|vllm|openai)$|{SPEC}", json_schema_extra=BACKEND_SECTION
    )
    """shared_prefix (each prompt is computed once), hf_generate, vllm, openai (running servers), auto (vllm where it is
    installed and a GPU is there, else the first of raftune's own two that passes a parity check), or a custom backend
    (file.py:NAME, module:NAME). With options: {kind: vllm, python: …}."""
    backend_options: dict[str, Any] = Field(default_factory=dict, description="Options of a backend that has some.")
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
        if not isinstance(value, dict):
            return value
        backend, given = value.get("backend", "auto"), value.get("backend_options", {})
        if isinstance(backend, dict):
            kind = str(backend.get("kind", "auto"))
            names = {"kind", "options"} if kind not in SERVERS else {"kind", *SERVERS[kind].model_fields}
            if unknown := sorted(set(backend) - names):
                raise ValueError(f"sampling.backend.{unknown[0]} is not a field; there are {', '.join(sorted(names))}.")
            rest = {name: option for name, option in backend.items() if name != "kind"}
            backend, given = kind, rest if kind in SERVERS else rest.get("options", {})
        if backend in ("openai", "vllm") or (backend in SERVERS and given):
            given = _server_options(backend, given)
        return {**value, "backend": backend, "backend_options": given} if given or backend != "auto" else value

    @property
    def server(self) -> ServerBackend | None:
        """The options of the servers that generate, or, with `auto`, may; None for any other backend."""
        cls = SERVERS.get(self.backend)
        return None if cls is None else cls(**self.backend_options)

    @model_validator(mode="after")
    def _options_are_used(self) -> SamplingConfig:
        if self.backend_options and ":" not in self.backend and self.backend not in SERVERS:
            raise ValueError(
                f"backend_options are those of a backend of your own; got {self.backend_options} with backend "
                f"{self.backend!r}, which has none. Leave them out."
            )
        if self.backend in ("vllm", "openai") and self.generation_kwargs:
            raise ValueError(
                f"generation_kwargs are options of transformers' `generate`; got {sorted(self.generation_kwargs)} with "
                f"backend {self.backend}. Leave them out, or choose another backend."
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


# The dotted fields that change what a policy generates, without the options of the backend (`shaping`).
DRAWN_BY = (
    *("sampling.temperature", "sampling.top_p", "sampling.top_k", "sampling.min_p", "sampling.repetition_penalty"),
    *("sampling.max_completion_length", "sampling.backend", "sampling.stop"),
    *("sampling.generation_kwargs", "sampling.system_prompt", "sampling.few_shot_prefix"),
    *("sampling.chat_template_kwargs", "sampling.diffusion", "engine.threads"),
)


def _server_options(kind: str, given: Any) -> dict[str, Any]:
    """All options of this kind of server, as plain data. Raises ValueError that names the option."""
    try:
        options = SERVERS[kind].model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(["sampling.backend", *map(str, first["loc"])])
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ValueError(f"{field} is wrong: {message}; got {first['input']!r}. Change it.") from None
    if kind == "openai" and not options.url:
        raise ValueError("sampling.backend.url must name a server; got none. Write url: http://127.0.0.1:8000.")
    if kind == "auto" and options.url:
        raise ValueError(
            f"sampling.backend.url is an option of vllm and openai; got {options.url} with auto. Write kind: vllm."
        )
    of_running = {"model", "key_env", "update"}
    of_started = VllmBackend.model_fields.keys() - ServerBackend.model_fields.keys()
    for name in sorted(type(options).model_fields.keys() & (of_started if options.url else of_running)):
        if (value := getattr(options, name)) != VllmBackend.model_fields[name].default:
            whose = "a server that raftune starts" if options.url else "servers that run already"
            fix = "leave out url" if options.url else "name them by url"
            raise ValueError(f"sampling.backend.{name} is an option of {whose}; got {value!r}. Leave it out, or {fix}.")
    arguments = [argument.partition("=")[0] for argument in getattr(options, "args", ())]
    if taken := [name for name in arguments if name.replace("_", "-") in VLLM_FLAGS]:
        raise ValueError(
            f"sampling.backend.args must not hold {taken[0]}, which raftune sets. Use its own fields (gpu_memory, "
            "policy.dtype, policy.adapter), or leave it out."
        )
    return options.model_dump(mode="json")


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


def shaping(config: SamplingConfig) -> tuple[str, ...]:
    """The dotted fields of a backend's options that change what is generated; not where a server is, for example."""
    if config.backend not in SERVERS or not config.backend_options:
        return ("sampling.backend_options",)
    return ("sampling.backend_options.args",) if "args" in config.backend_options else ()


def backend_code(config: SamplingConfig) -> dict[str, str]:
    """The hash of the file that a custom backend is read from."""
    return {"backend's classes": code_hash(config.backend)} if ":" in config.backend else {}
