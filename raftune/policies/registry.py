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
# What a class must have before anything runs, and what it must give back when it is loaded.
OF_A_FAMILY = ("media", "payload", "start", "load", "verify")
OF_A_POLICY = ("media", "payload", "nbytes", "generate", "encode_completion", "train", "notes")


class Family(Protocol):
    """A kind of policy: how one is begun, checked and loaded."""

    media: str
    payload: pa.Schema

    def start(self, config: RunConfig, out: Path, model: Any = None, tokenizer: Any = None) -> Any: ...
    def load(self, config: RunConfig, folder: Path, start: Path) -> Policy: ...
    def verify(self, start: Path) -> None: ...


def family_of(config: RunConfig) -> Family:
    """The class of the configured family. Raises ConfigError where a custom one is not there, or is not whole."""
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
    if isinstance(config.policy, CustomPolicy):
        refuse_incomplete(family, name)
    return family


def refuse_incomplete(family: Any, name: str) -> None:
    """Raises ConfigError for a family that lacks something, produces no known kind of thing, or has no `completion`."""
    refuse_missing(family, OF_A_FAMILY, f"policy.family: {name}")
    if family.media not in MEDIA:
        raise ConfigError(
            f"policy.family: media of {name} must be one of {', '.join(MEDIA)}; got {family.media!r}. Rewards and "
            "measures go by it."
        )
    names = family.payload.names if isinstance(family.payload, pa.Schema) else None
    if not names or names[0] != "completion":
        given = f"the columns {', '.join(names) or 'none'}" if names is not None else type(family.payload).__name__
        raise ConfigError(
            f"policy.family: payload of {name} must be a pyarrow.schema whose first column is `completion`, what the "
            f"rewards are given; got {given}. {GUIDE}"
        )
    if family.media == "image" and family.payload.field("completion").type != pa.binary():
        raise ConfigError(
            f"policy.family: `completion` of {name}, whose media is image, must be binary: the bytes of a PNG; got "
            f"{family.payload.field('completion').type}. {GUIDE}"
        )


def refuse_missing(found: object, names: tuple[str, ...], what: str) -> None:
    """Raises ConfigError that names everything which `found` lacks."""
    if missing := [name for name in names if not hasattr(found, name)]:
        raise ConfigError(f"{what} must have {', '.join(names)}; it lacks {', '.join(missing)}. {GUIDE}")


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


def make_relative(out: Path, given: str | None, final: Path | None = None) -> None:
    """Makes what a start written into `out`, to be moved to `final`, refers to relative, where it was given relative.

    A folder of a stage and one under tmp/ lie equally deep in a run, so that the same path holds in both. So a project
    can be moved as a whole, and what is made from the start does not depend on where it lies.
    """
    if given is None or Path(given).expanduser().is_absolute() or not Path(given).is_dir():
        return
    place = Path(given).resolve()
    for path, key in ((out / "reference.json", "name"), (out / "raftune.json", "model")):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if content.get(key) == str(place):
            content[key] = Path(os.path.relpath(place, (final or out).resolve())).as_posix()
            dump_json(path, content)


def load_policy(family: Family, config: RunConfig, folder: Path, start: Path) -> Policy:
    """The policy of a committed folder, all of whose files are as they were committed. Raises RunDamaged.

    Raises ConfigError where a family of your own gives back what is none."""
    for place in {folder, start}:
        check_folder(place)
    policy = family.load(config, folder, start)
    if isinstance(config.policy, CustomPolicy):
        refuse_missing(policy, OF_A_POLICY, f"what {config.policy.family} loads (a {type(policy).__name__})")
    return policy


def code_of(config: RunConfig) -> Mapping[str, str]:
    """The hash of the file that a family of your own is read from: with other code, a run is another run."""
    if not isinstance(config.policy, CustomPolicy) or not config.policy.family.rpartition(":")[0].endswith(".py"):
        return {}
    code = code_hash(config.policy.family)
    return {"family's classes": code} if code else {}
