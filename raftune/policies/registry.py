"""Registry of policy families: finds the class, and checks a custom one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from raftune.config.extensions import code_hash, load_object
from raftune.config.policy import CustomPolicy
from raftune.config.run import RunConfig
from raftune.errors import ConfigError, ModelError
from raftune.protocols import Policy
from raftune.sanitize import first_line
from raftune.store.committed import check_folder
from raftune.store.files import dump_json

FAMILIES = {
    "tabular": "raftune.policies.tabular.policy:Tabular",
    "causal_lm": "raftune.policies.causal_lm:CausalLM",
    "diffusion": "raftune.policies.diffusion:Diffusion",
}
MEDIA = ("text", "messages", "image", "category")
GUIDE = "docs/families.md says what each is for."
# Attributes of a family's class, and of the policy that it loads.
OF_A_FAMILY = ("media", "payload", "start", "load", "verify")
OF_A_POLICY = ("media", "payload", "nbytes", "generate", "encode_completion", "train", "notes")
# Fields of `policy` that do not apply to the teacher, with the values that it gets.
NOT_THE_TEACHERS: dict[str, Any] = {
    **dict.fromkeys(("adapter", "tokenizer", "revision", "variant")),
    "pipeline_init_kwargs": {},
}


class Family(Protocol):
    """A kind of policy: how one is started, checked and loaded."""

    media: str
    payload: pa.Schema

    def start(self, config: RunConfig, out: Path, model: Any = None, tokenizer: Any = None) -> Any: ...
    def load(self, config: RunConfig, folder: Path, start: Path) -> Policy: ...
    def verify(self, start: Path) -> None: ...


def family_of(config: RunConfig) -> Family:
    """The class of the configured family. Raises ConfigError where a custom one is missing or incomplete."""
    name = config.policy.family
    try:
        family: Family = load_object(FAMILIES.get(name, name), "policy.family")
    except (ConfigError, MemoryError, SystemError) as error:
        if name not in FAMILIES:
            raise
        raise ModelError(
            f"policy.family: {name} cannot be loaded: {first_line(error.__cause__ or error)}. Check that memory "
            "suffices (`ulimit -v`), and that torch and transformers are installed whole."
        ) from error
    if not isinstance(config.policy, CustomPolicy):
        return family
    refuse_missing(family, OF_A_FAMILY, f"policy.family: {name}")
    if family.media not in MEDIA:
        raise ConfigError(
            f"policy.family: media of {name} must be one of {', '.join(MEDIA)}; got {family.media!r}. Rewards and "
            "measures go by it."
        )
    names = family.payload.names if isinstance(family.payload, pa.Schema) else None
    if not names or names[0] != "completion":
        shown = f"the columns {', '.join(names) or 'none'}" if names is not None else type(family.payload).__name__
        raise ConfigError(
            f"policy.family: payload of {name} must be a pyarrow.schema whose first column is `completion`, what the "
            f"rewards are given; got {shown}. {GUIDE}"
        )
    kind = family.payload.field("completion").type
    if family.media == "image" and kind != pa.binary():
        raise ConfigError(
            f"policy.family: `completion` of {name}, whose media is image, must be binary: the bytes of a PNG; got "
            f"{kind}. {GUIDE}"
        )
    return family


def refuse_missing(instance: object, names: tuple[str, ...], subject: str) -> None:
    """Raises ConfigError that names every missing attribute."""
    if missing := [name for name in names if not hasattr(instance, name)]:
        raise ConfigError(f"{subject} must have {', '.join(names)}; it lacks {', '.join(missing)}. {GUIDE}")


def start_policy(
    family: Family,
    config: RunConfig,
    out: Path,
    model: Any = None,
    tokenizer: Any = None,
    *,
    final: Path | None = None,
) -> None:
    """Writes the initial model into `out`, which is then moved to `final`.

    Raises RunDamaged where a folder that it is read from is not as written.
    """
    for name in (getattr(config.policy, "model", None), getattr(config.policy, "tokenizer", None)):
        if isinstance(name, str) and Path(name).expanduser().is_dir():
            check_folder(Path(name).expanduser())
    family.start(config, out, model, tokenizer)
    make_relative(out, getattr(config.policy, "model", None), final)


def make_relative(out: Path, model: str | None, final: Path | None = None) -> None:
    """Makes the path in a start's record relative, where `model` was configured so; `out` is to be moved to `final`.

    A folder of a stage and one under tmp/ lie equally deep in a run, so that the same path holds in both: a project can
    be moved as a whole, and hashes do not depend on where it lies.
    """
    if model is None or Path(model).expanduser().is_absolute() or not Path(model).is_dir():
        return
    folder = Path(model).resolve()
    for path, key in ((out / "reference.json", "name"), (out / "raftune.json", "model")):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if content.get(key) == str(folder):
            content[key] = Path(os.path.relpath(folder, (final or out).resolve())).as_posix()
            dump_json(path, content)


def load_policy(family: Family, config: RunConfig, folder: Path, start: Path) -> Policy:
    """The policy of a committed folder. Raises RunDamaged where a file has changed since it was committed, ConfigError
    where a custom family returns no policy."""
    for path in {folder, start}:
        check_folder(path)
    policy = family.load(config, folder, start)
    if isinstance(config.policy, CustomPolicy):
        refuse_missing(policy, OF_A_POLICY, f"what {config.policy.family} loads (a {type(policy).__name__})")
    return policy


def code_of(config: RunConfig) -> Mapping[str, str]:
    """The hash of a custom family's file: with other code, a run is another run."""
    if not isinstance(config.policy, CustomPolicy) or not config.policy.family.rpartition(":")[0].endswith(".py"):
        return {}
    code = code_hash(config.policy.family)
    return {"family's classes": code} if code else {}


# -- the teacher: a second model of the policy's family, which generates and is not trained ----------------------------


def start_teacher(family: Family, config: RunConfig, out: Path) -> None:
    """Writes the teacher as a family writes its start; errors name the teacher's own field."""
    try:
        family.start(teacher_config(config), out)
        make_relative(out, config.sampling.teacher.model if config.sampling.teacher is not None else None)
    except ModelError as error:
        raise type(error)(str(error).replace("policy.model", "sampling.teacher.model")) from error


def teacher_config(config: RunConfig) -> RunConfig:
    """The configuration with the teacher in the policy's place: the same family and options, no adapter, and no rounds,
    as it need not be trainable."""
    assert config.sampling.teacher is not None
    changes = {name: value for name, value in NOT_THE_TEACHERS.items() if hasattr(config.policy, name)}
    changes["model"] = config.sampling.teacher.model
    sampling = config.sampling
    if sampling.server is not None:  # it serves the policy
        sampling = sampling.model_copy(update={"backend": "auto", "backend_options": {}})
    policy = config.policy.model_copy(update=changes)
    return config.model_copy(update={"policy": policy, "sampling": sampling, "num_rounds": 0})
