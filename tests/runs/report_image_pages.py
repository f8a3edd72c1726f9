"""The page of a run of images, made to measure: the document of report_pages with a small PNG for every answer."""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Any

from raftune.report.images import embed
from tests.runs.report_pages import document

VOID = "0001/p0-0/002"  # the sample of which no image could be made


def png(*colours: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    """A PNG of horizontal stripes in these colours."""
    width, height = size
    rows = b"".join(b"\0" + bytes(colours[row % len(colours)]) * width for row in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def painted(rounds: int = 2, prompts: int = 3, text: str = "", **changes: Any) -> dict[str, Any]:
    """A run of images: every answer another one, but those of training rows, which are their samples' own."""
    found = document(rounds, prompts, text)
    found["run"]["media"] = "image"
    pictures: dict[str, Any] = {}
    samples = [sample for item in found["prompts"]["items"] for sample in item["samples"]]
    answers = [answer for item in found["compare"]["items"] for answer in item["answers"].values()]
    for number, sample in enumerate([*samples, *answers]):
        bytes_ = png((number % 256, 40 + number // 256, 90), (200, 200, 60))
        name = hashlib.sha256(bytes_).hexdigest()
        pictures[name] = embed(bytes_, "round-0001/generate/chunk-00000.parquet").as_json()
        sample |= {"completion": {"image": name}, "tokens": None, "finish": None}
    by_id = {sample["id"]: sample for sample in samples}
    for row in found["learned"]["items"]:
        row["completion"] = by_id[row["sample_id"]]["completion"]
    no_picture = {"completion": None, "invalid": f"not finite{text}", "status": "invalid", "score": None, "rank": 0}
    samples[2] |= no_picture | {"parts": {}, "reason": "invalid sample", "weight": 0.0}
    found["compare"] |= {"rounds": list(range(rounds + 1)), "of_rounds": rounds + 1}
    return found | {"images": pictures} | changes
