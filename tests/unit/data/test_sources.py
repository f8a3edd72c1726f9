"""Claims about where feedback lies: the same rows from every container, line by line, and nothing lost in silence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from raftune.data.feedback import read_demonstrations, read_preferences, read_ratings
from raftune.data.rows import write_skipped
from raftune.data.tables import json_rows
from raftune.errors import DataError

ROWS = [
    {"prompt": f"p{i}", "chosen": f"a{i}\u2028\x85 and more", "rejected": "b" if i != 3 else ""} for i in range(2000)
]


def as_lines(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    return str(path)


def as_zipped_lines(folder: Path) -> str:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\r\n".join(map(json.dumps, ROWS)).encode("utf-8-sig")))
    return str(path)


def as_array(folder: Path) -> str:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return str(path)


def as_parquet(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", write_page_checksum=True)
    return str(folder / "rows.parquet")


def as_csv(folder: Path) -> str:
    pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), folder / "rows.csv")
    return str(folder / "rows.csv")


def as_folder(folder: Path) -> str:
    split = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    datasets.disable_progress_bars()
    split.save_to_disk(str(folder / "rows"))
    return str(folder / "rows")


@pytest.mark.parametrize("write", [as_lines, as_zipped_lines, as_array, as_parquet, as_csv, as_folder])
def test_every_container_gives_the_same_rows(tmp_path: Path, write: Any) -> None:
    found = read_preferences(write(tmp_path))
    assert len(found.rows) == 1999
    assert [(s.row, str(s.reason)) for s in found.skipped] == [(4, "empty answer")]
    assert [(p.row, p.prompt, p.chosen) for p in found.rows[:4:3]] == [
        (1, "p0", "a0\u2028\x85 and more"),
        (5, "p4", "a4\u2028\x85 and more"),
    ]


def test_a_line_is_read_only_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 100 + b"{" * 10_000_000)
    rows = json_rows(path, "data")
    assert next(rows) == (1, {"a": 1})


def test_blank_lines_are_no_rows_and_do_not_shift_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n\n{"prompt": "p", "chosen": "a", "rejected": "b"}\n  \n\n{', encoding="utf-8")
    found = read_preferences(str(path))
    assert [pair.row for pair in found.rows] == [3]
    assert [one.row for one in found.skipped] == [6]


def test_a_zipped_file_that_is_cut_off_is_refused_and_not_read_in_part(tmp_path: Path) -> None:
    whole = Path(as_zipped_lines(tmp_path))
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"data: .*rows.jsonl.gz cannot be read to its end"):
        read_preferences(str(whole))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "must name a file that exists"),
        ("empty.jsonl", b"", "must hold at least one row"),
        ("notes.txt", b"x", "must end in one of"),
        ("bad.json", b"[1, 2", "is not valid JSON"),
        ("bad.parquet", b"PAR1 not really", "cannot be read"),
        ("bad.jsonl.gz", b"not zipped", "cannot be read to its end"),
    ],
)
def test_a_source_that_cannot_be_read_at_all_is_an_error_that_says_why(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_preferences(str(tmp_path / name))


def test_a_file_of_skipped_rows_names_each_with_its_reason(tmp_path: Path) -> None:
    found = read_preferences(as_lines(tmp_path))
    write_skipped(found.skipped, tmp_path / "skipped.jsonl")
    [line] = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"row": 4, "reason": "empty answer", "detail": "rejected is blank"}


def test_a_csv_with_semicolons_and_decimal_commas_is_read_as_ratings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question;answer;rating\nsix; 7;4,5\nb;c;0,125\nd;e;1,234\nf;g;3\nh;i;good\n")
    found = read_ratings(str(tmp_path / "a.csv"))
    assert [(one.prompt, one.completion, one.score) for one in found.rows] == [
        ("six", " 7", 4.5),
        ("b", "c", 0.125),
        ("f", "g", 3.0),
    ]
    assert [(one.row, one.reason) for one in found.skipped] == [(3, "wrong type"), (5, "wrong type")]


def test_answers_of_csv_that_are_numbers_are_the_texts_that_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nsix and one,7\nten,10\n")
    assert [one.completion for one in read_demonstrations(str(tmp_path / "a.csv")).rows] == ["7", "10"]
