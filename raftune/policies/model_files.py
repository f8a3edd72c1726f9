"""Files of models: what both neural families read, check and write, and how a committed model is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raftune.errors import ModelError, StoreError
from raftune.protocols import ModelUsage
from raftune.store.commit import NAME as COMMIT
from raftune.store.committed import MANIFEST
from raftune.store.files import dump_json
from raftune.store.run import DROPPED

ADAPTER, REFERENCE, OPTIMIZER = "adapter_config.json", "reference.json", "optimizer.safetensors"
# One key only: with two or more, safetensors writes them in an order that varies from process to process.
METADATA = {"format": "pt"}
# What a committed model folder holds besides the model.
OURS = frozenset({COMMIT, DROPPED, "training.json", REFERENCE, OPTIMIZER, "parity.json", MANIFEST})


def is_path(name: str) -> bool:
    """Whether a model's name can only be meant as a folder, and not as a name on the hub."""
    return Path(name).expanduser().is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def check_unchanged(folder: Path, recorded: str, fingerprint: Callable[[Path], str]) -> None:
    """Raises ModelError if the model that a run began with is gone, or has another fingerprint than was recorded."""
    if not folder.is_dir():
        raise ModelError(f"policy.model must still be where the run began; {folder} is gone. Put it back.")
    if recorded and (now := fingerprint(folder)) != recorded:
        raise ModelError(
            f"policy.model must not change during a run; {folder} was {recorded[:12]} and is {now[:12]}. Put the files "
            "back, or start a new run."
        )


def check_finite(model: Any, prefix: str = "") -> None:
    """Raises ModelError for the first weight that is a NaN or an infinity."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise ModelError(
                f"policy.model must have finite weights; {prefix}{name} has a NaN or an infinity. Use another model."
            )


def rounding_note(config: Any, dtype: str) -> dict[str, None]:
    """A note where a run trains whole weights of 16 bits, whose steps are rounded to them; else none."""
    smallest = {"bfloat16": 512, "float16": 4096}.get(dtype)
    if smallest is None or config.policy.adapter is not None or not getattr(config, "num_rounds", 1):
        return {}
    note = (
        f"policy.dtype is {dtype} and all weights are trained: a step that moves a weight by less than "
        f"1/{smallest} of it is rounded away. Write dtype: float32 (with training.bf16: true on a GPU), or add "
        "an adapter"
    )
    return {note: None}


def sorted_sets(value: Any) -> Any:
    """The value with its sets as sorted lists: their own order depends on the process."""
    if isinstance(value, Mapping):
        return {str(key): sorted_sets(item) for key, item in sorted(value.items())}
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def write_optimizer(out: Path, tensors: Mapping[str, Any] | None) -> None:
    """Writes the state (`parameter/entry` → tensor) that the next round's training carries on, if there is one."""
    from safetensors.torch import save_file

    if tensors:
        save_file(dict(sorted(tensors.items())), out / OPTIMIZER, metadata=METADATA)


def read_optimizer(folder: Path) -> dict[str, Any]:
    """The optimizer's state in a round's model folder; empty where there is none."""
    from safetensors.torch import load_file

    path = folder / OPTIMIZER
    return load_file(path) if path.is_file() else {}


@dataclass(frozen=True)
class StartReference:
    """Where an initial language model is: an absolute path with the hash of its files, or a hub name at a commit."""

    name: str
    revision: str | None
    fingerprint: str

    @property
    def on_hub(self) -> bool:
        return self.fingerprint.startswith("hub:")

    def write(self, folder: Path) -> None:
        dump_json(folder / REFERENCE, asdict(self))


def read_reference(start: Path) -> StartReference | None:
    """The reference that a start folder holds; None where the folder holds the weights themselves."""
    path = start / REFERENCE
    if not path.is_file():
        return None
    reference = StartReference(**json.loads(path.read_text(encoding="utf-8")))
    if reference.name.startswith(".."):  # relative to the start folder
        return replace(reference, name=str((start / reference.name).resolve()))
    return reference


# -- publishing --------------------------------------------------------------------------------------------------------


def publish_files(folder: Path, start: Path, out: Path, tokenizer: str | None) -> ModelUsage:
    """Copies a committed model's files, with tokenizer, and with its base where only the run has that."""
    copy_files(weights_of(folder), out)
    adapter = (out / ADAPTER).is_file()
    if adapter:
        ground_adapter(start, out, tokenizer)
    if folder == start:  # the start's own files may be another tokenizer's
        copy_tokenizer(start, out, tokenizer)
    return ModelUsage("peft" if adapter else "transformers")


def weights_of(folder: Path) -> Path:
    """The folder of a committed model's files: its own, or the one that the start's reference names."""
    reference = None if (folder / ADAPTER).is_file() else read_reference(folder)
    if reference is None:
        return folder
    if Path(reference.name).is_dir():
        return Path(reference.name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(reference.name, revision=reference.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StoreError(
            f"the start model {reference.name!r} is neither here nor on the hub now. Check the network."
        ) from error


def copy_files(source: Path, out: Path, names: tuple[str, ...] = ()) -> None:
    """Copies a model's own files, and those of folders in it, without hidden ones and those of the run; with `names`,
    those files alone that lie in the folder itself and begin so.

    Raises StoreError for a link that leads out of the folder, unless to the hub's cache: its target is no part of a
    model, and must not be published with it.
    """
    home = source.resolve()
    allowed = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in sorted(source.iterdir() if names else source.rglob("*")):
        name, target = path.relative_to(source), path.resolve()
        if path.is_dir() or (names and not (path.is_file() and path.name.startswith(names))):
            continue
        if any(part.startswith(".") for part in name.parts) or name.as_posix() in (*OURS, "README.md"):
            continue
        if not target.is_file() or not any(target.is_relative_to(folder) for folder in allowed):
            raise StoreError(
                f"{path} is a link out of the model's folder, to {target}, and is not copied. Put the file itself "
                "there."
            )
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, out / name)


def ground_adapter(start: Path, out: Path, tokenizer: str | None) -> None:
    """Gives an adapter its tokenizer, and a base that can be found from anywhere."""
    path, base, reference = out / ADAPTER, {}, read_reference(start)
    if reference is None:
        copy_files(start, out / "base")
        base = {"base_model_name_or_path": str((out / "base").resolve()), "revision": None}
    elif not reference.on_hub:
        base = {"base_model_name_or_path": str(weights_of(start))}
    dump_json(path, json.loads(path.read_text()) | base)
    copy_tokenizer(start, out, tokenizer)


def copy_tokenizer(start: Path, out: Path, configured: str | None) -> None:
    """Copies the run's tokenizer: the configured one where it is a folder, else the one beside the start."""
    if (start / "tokenizer_config.json").is_file():  # one given as an object lies there
        source = start
    else:
        source = Path(configured) if configured and Path(configured).is_dir() else weights_of(start)
    copy_files(
        source, out, ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "chat_template")
    )
