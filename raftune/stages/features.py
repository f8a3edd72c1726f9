"""Stage `evaluation features`: feature vectors of held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from raftune.data.images import LazyImages
from raftune.protocols import FeatureExtractor, StageInputs
from raftune.records import INVALID
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_table, write_table

IDENTITY = ("sample_id", "prompt_id", "k", "source")
GENERATED = "evaluate/generate"


class FeaturesStage:
    """One file per chunk, row for row beside what was generated: `features`, null for a sample that is no image."""

    name = "evaluation features"
    writes = "evaluate/features"
    local = False
    reads = (GENERATED,)
    fields: tuple[str, ...] = ()

    def __init__(self, extractor: Callable[[], FeatureExtractor]) -> None:
        self.extractor = extractor

    def fingerprints(self) -> Mapping[str, str]:
        return {"features": self.extractor().fingerprint}

    def chunks(self, inputs: StageInputs) -> list[int]:
        return chunk_numbers(inputs[GENERATED])

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        path = inputs[GENERATED] / chunk_file(index)
        samples = read_table(path, [name for name in (*IDENTITY, "completion", INVALID) if name in column_names(path)])
        there = samples.column("completion").is_valid()
        if INVALID in samples.column_names:
            there = pc.and_(there, samples.column(INVALID).is_null())
        shown = samples.filter(there)
        found = self.extractor().image_features(LazyImages(shown.column("completion"), shown.column("sample_id")))
        vectors = iter(found.tolist())
        rows = [next(vectors) if valid else None for valid in there.to_pylist()]
        features = pa.array(rows, pa.list_(pa.float32()))
        write_table(samples.select(IDENTITY).append_column("features", features), out, metadata)
        return ()


@dataclass(frozen=True)
class KnownFeatures:
    """The vectors of samples, found again by what stays the same from round to round: prompt and k, and so the seed."""

    places: Mapping[tuple[str, int], int]
    features: pa.ChunkedArray

    def of(self, samples: pa.Table) -> pa.ChunkedArray:
        """Row for row; null where there is none."""
        rows = pa.array([self.places.get(key) for key in keys(samples)], pa.int64())
        return self.features.take(rows)


def features_of(folder: Path) -> KnownFeatures:
    """The vectors of all samples of a round."""
    columns = ("prompt_id", "k", "features")
    table = pa.concat_tables(read_table(folder / chunk_file(chunk), columns) for chunk in chunk_numbers(folder))
    return KnownFeatures({key: row for row, key in enumerate(keys(table))}, table.column("features"))


def keys(samples: pa.Table) -> list[tuple[str, int]]:
    return list(zip(samples.column("prompt_id").to_pylist(), samples.column("k").to_pylist(), strict=True))
