"""Checks that a folder is a complete diffusers pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raftune.errors import ModelError

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
VARIANT = re.compile(r"model(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+)?\.safetensors$")
LORA = "pytorch_lora_weights.safetensors"
# By what a part is: the file that describes it; any one of them will do.
DESCRIBED_BY = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer_config.json"),
    "feature_extractor": ("preprocessor_config.json",),
}


@dataclass(frozen=True)
class PipelineComponent:
    """One entry of a pipeline's index: its folder's name, and the class that reads it."""

    name: str
    library: str
    kind: str

    @property
    def described_by(self) -> tuple[str, ...]:
        """The names of the file that says what this part is."""
        found = [files for begin, files in DESCRIBED_BY.items() if self.name.startswith(begin)]
        return found[0] if found else ("config.json",)

    @property
    def has_weights(self) -> bool:
        return self.described_by == ("config.json",)


def read_index(folder: Path) -> dict[str, Any]:
    """The pipeline's index. Raises ModelError where the folder is no pipeline, saying what it is instead."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        assert isinstance(index, dict)
        name = index["_class_name"]
    except FileNotFoundError:
        raise ModelError(f"policy.model must be a pipeline; {folder} has no {INDEX}. {_what_it_is(folder)}") from None
    except (ValueError, KeyError, AssertionError) as error:
        raise ModelError(
            f"policy.model must be a pipeline; {folder / INDEX} is damaged ({error}). Fetch the model again."
        ) from error
    if not isinstance(name, str):
        raise ModelError(
            f"policy.model must be a pipeline of diffusers itself; {folder} brings code of its own ({name}), which is "
            "never run. Use a pipeline whose class comes with diffusers."
        )
    return index


def _what_it_is(folder: Path) -> str:
    """What a folder without an index holds, with the fix."""
    if (folder / "model" / INDEX).is_file():
        return f"Did you mean {folder / 'model'}?"
    if (folder / LORA).is_file():
        return "It holds a LoRA alone: load it onto its pipeline, fuse it, and save that with save_pretrained."
    if (folder / "config.json").is_file():
        return "It holds a single model: name the folder of the whole pipeline."
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.ckpt")):
        return "Turn the single file into a folder: Pipeline.from_single_file(FILE).save_pretrained(FOLDER)."
    return "Name a folder that save_pretrained wrote."


def parts_of(index: dict[str, Any]) -> list[PipelineComponent]:
    """The parts that the index names, without those that are left out on purpose (null)."""
    entries = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    return [
        PipelineComponent(name, str(value[0]), str(value[1])) for name, value in sorted(entries.items()) if value[0]
    ]


def denoiser_of(index: dict[str, Any]) -> PipelineComponent:
    """The part that is aligned. Raises ModelError for a pipeline without one."""
    found = [part for part in parts_of(index) if part.name in DENOISERS]
    if len(found) != 1:
        what = ", ".join(part.name for part in found) or "none"
        raise ModelError(
            f"policy.model must be a pipeline with one denoiser, unet or transformer; {index['_class_name']} has "
            f"{what}. Use another pipeline."
        )
    return found[0]


def refuse_missing_parts(
    folder: Path, index: dict[str, Any], left_out: frozenset[str] = frozenset(), variant: str | None = None
) -> None:
    """Raises ModelError where a part that the index names is not there, or not whole: names each part."""
    parts = [part for part in parts_of(index) if part.name not in left_out]
    lacking = [why for part in parts for why in _faults(folder, part)]
    if lacking:
        raise ModelError(
            f"policy.model must be a whole pipeline; {folder} lacks {'; '.join(lacking)}. Fetch the model again, or "
            "save it anew with save_pretrained; a part that is not needed (a safety_checker) can be left out with "
            "policy.pipeline_init_kwargs: {NAME: null}."
        )
    _refuse_other_variants([folder / part.name for part in parts if part.has_weights], variant)


def _refuse_other_variants(places: list[Path], variant: str | None) -> None:
    """Raises ModelError where weights lie there in other variants than the one that is read."""
    found = {place: _variants(place) for place in places}
    every = sorted({str(one) for ones in found.values() for one in ones if one is not None})
    if variant is None and (without := [place for place, ones in found.items() if ones and None not in ones]):
        raise ModelError(
            f"policy.variant must name the weights to read; {without[0]} has them as {', '.join(every)} alone. Write "
            f"policy.variant: {every[0]}."
        )
    if variant is not None and variant not in every:
        there = f"there is {', '.join(every)}" if every else "its weights have none"
        raise ModelError(
            f"policy.variant must be one that the pipeline has; got {variant!r}, and {there}. "
            f"{f'Write policy.variant: {every[0]}' if every else 'Leave it out'}."
        )


def _variants(place: Path) -> set[str | None]:
    """In which variants a part's weights are there; None is the plain one."""
    names = (VARIANT.search(path.name) for path in place.glob("*.safetensors"))
    return {name["variant"] for name in names if name}


def _faults(folder: Path, part: PipelineComponent) -> Iterator[str]:
    place = folder / part.name
    if not place.is_dir():
        yield f"the folder {part.name}/ ({part.kind})"
        return
    if not any((place / name).is_file() for name in part.described_by):
        yield f"{part.name}/{part.described_by[0]} ({part.kind})"
    if part.has_weights:
        yield from _missing_weights(place, part)


def _missing_weights(place: Path, part: PipelineComponent) -> Iterator[str]:
    """The weights that are not there: none at all, pickled ones alone, or shards that an index names."""
    if not any(place.glob("*.safetensors")):
        pickled = any(place.glob("*.bin"))
        what = "pickled, and only safetensors are read: load and save it once where you trust it" if pickled else ""
        yield f"the weights {part.name}/*.safetensors ({part.kind}{f'; there are only {what}' if what else ''})"
    for index in sorted(place.glob("*.safetensors.index*.json")):
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if gone := [name for name in shards if not (place / name).is_file()]:
            yield f"{len(gone)} of {len(shards)} shards of {part.name}/ ({gone[0]}, …)"
