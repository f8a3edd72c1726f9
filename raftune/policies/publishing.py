"""Copies of a committed model's files, which transformers or peft loads: how a model is published by default."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from raftune.errors import StoreError
from raftune.protocols import ModelUsage
from raftune.store.commit import NAME as COMMIT
from raftune.store.committed import MANIFEST
from raftune.store.files import dump_json
from raftune.store.run import DROPPED

# What a committed model folder holds besides the model.
OURS = frozenset({COMMIT, DROPPED, "training.json", "reference.json", "optimizer.safetensors", "parity.json", MANIFEST})
ADAPTER, REFERENCE = "adapter_config.json", "reference.json"


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
    if not (folder / REFERENCE).is_file() or (folder / ADAPTER).is_file():
        return folder
    reference = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))
    name: str = reference["name"]
    place = (folder / name).resolve() if name.startswith("..") else Path(name)
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=reference["revision"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StoreError(f"the start model {name!r} is neither here nor on the hub now. Check the network.") from error


def copy_files(source: Path, out: Path) -> None:
    """Copies a model's own files, and those of folders in it, without hidden ones and those of the run.

    Raises StoreError for a link that leads out of the folder, unless to the hub's cache: its target is no part of a
    model, and must not be published with it.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if not (hidden or path.is_dir() or name.as_posix() in (*OURS, "README.md")):
            copy_file(path, out / name, source)


def copy_file(path: Path, out: Path, source: Path) -> None:
    """Copies one file of a model folder. Raises StoreError as `copy_files` does."""
    home, target = source.resolve(), path.resolve()
    allowed = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if not target.is_file() or not any(target.is_relative_to(place) for place in allowed):
        raise StoreError(
            f"{path} is a link out of the model's folder, to {target}, and is not copied. Put the file itself there."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(target, out)


def ground_adapter(start: Path, out: Path, tokenizer: str | None) -> None:
    """Gives an adapter its tokenizer, and a base that can be found from anywhere."""
    path, base = out / ADAPTER, {}
    if not (start / REFERENCE).is_file():
        (out / "base").mkdir(exist_ok=True)
        copy_files(start, out / "base")
        base = {"base_model_name_or_path": str((out / "base").resolve()), "revision": None}
    elif not json.loads((start / REFERENCE).read_text(encoding="utf-8"))["fingerprint"].startswith("hub:"):
        base = {"base_model_name_or_path": str(weights_of(start))}
    if base:
        dump_json(path, json.loads(path.read_text()) | base)
    copy_tokenizer(start, out, tokenizer)


def copy_tokenizer(start: Path, out: Path, configured: str | None) -> None:
    """Copies the run's tokenizer: the configured one where it is a folder, else the one beside the start."""
    place = Path(configured) if configured and Path(configured).is_dir() else weights_of(start)
    place = start if (start / "tokenizer_config.json").is_file() else place  # one given as an object lies there
    names = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "chat_template")
    for path in sorted(place.iterdir()):
        if path.is_file() and path.name.startswith(names):
            copy_file(path, out / path.name, path.parent)
