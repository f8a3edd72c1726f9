"""Stage `evaluation features`: feature vectors of held-out images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raftune.data.images import LazyImages
from raftune.protocols import ChunkedStage, StageInputs
from raftune.records import IDENTITY, INVALID
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_table, write_table


class FeaturesStage(ChunkedStage):
    """One file per chunk, row for row beside the samples: `features`, null for a sample that is no image."""

    name = "evaluation features"
    writes = "evaluate/features"
    reads = ("evaluate/generate",)

    def __init__(self, extractor: Callable[[], Any]) -> None:
        """`extractor` loads a model with `fingerprint` and `image_features`: see rewards.builtin.clip.ClipModel."""
        self.extractor = extractor

    def fingerprints(self) -> Mapping[str, str]:
        return {"features": self.extractor().fingerprint}

    def chunks(self, inputs: StageInputs) -> list[int]:
        return chunk_numbers(inputs["evaluate/generate"])

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        path = inputs["evaluate/generate"] / chunk_file(index)
        samples = read_table(path, [name for name in (*IDENTITY, "completion", INVALID) if name in column_names(path)])
        valid = samples.column("completion").is_valid()
        if INVALID in samples.column_names:
            valid = pc.and_(valid, samples.column(INVALID).is_null())
        images = samples.filter(valid)
        features = self.extractor().image_features(LazyImages(images.column("completion"), images.column("sample_id")))
        vectors = iter(features.tolist())
        rows = pa.array([next(vectors) if there else None for there in valid.to_pylist()], pa.list_(pa.float32()))
        write_table(samples.select(IDENTITY).append_column("features", rows), out, metadata)
        return ()
