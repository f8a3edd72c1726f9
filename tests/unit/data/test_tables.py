"""Every reader gives the values that it was given: with exactly their own keys, or an error that names the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raftune.data.tables import read_rows, table_from
from raftune.errors import DataError
from raftune.records import JsonType, arrow_array, without_none
from raftune.stages.data import prepare
from raftune.store.parquet import read_table, write_table

NESTED = [
    {"prompt": "a", "facts": {"city": "Paris"}, "odd": [1, "b", {"c": None}], "n": 1},
    {"prompt": "b", "facts": {"code": 7, "more": {}}, "odd": [], "n": 2},
    {"prompt": "c", "facts": {}, "odd": None, "n": 3},
]


def stored(table: pa.Table, folder: Path) -> list[dict[str, Any]]:
    """The rows, written and read as a run does."""
    write_table(table, folder / "rows.parquet")
    rows: list[dict[str, Any]] = read_table(folder / "rows.parquet").to_pylist()
    return rows


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "list", "pandas", "datasets with Json"])
def test_nested_values_keep_exactly_their_own_keys_and_order(kind: str, tmp_path: Path) -> None:
    if kind in ("jsonl", "json"):
        lines = [json.dumps(row) for row in NESTED]
        text = "\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]"
        table = read_rows(written(tmp_path / f"rows.{kind}", text))
    elif kind == "list":
        table = table_from(NESTED)
    elif kind == "pandas":
        table = table_from(pd.DataFrame(NESTED))
    else:
        table = table_from(datasets.Dataset.from_list(NESTED, on_mixed_types="use_json"))
    rows = stored(table, tmp_path)
    assert json.dumps([{**row, "n": 0} for row in rows]) == json.dumps([{**row, "n": 0} for row in NESTED])
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert table.schema.field("n").type == pa.int64()


def test_json_within_lists_of_datasets_is_read() -> None:
    given = datasets.Dataset.from_dict({"prompt": [[{"b": 0}, {"c": 0}]]}, on_mixed_types="use_json")
    assert pa.types.is_list(given.with_format("arrow")[:].schema.field(0).type)
    assert table_from(given).to_pylist() == [{"prompt": [{"b": 0}, {"c": 0}]}]


def test_regular_values_stay_in_arrow_s_own_types() -> None:
    messages = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}] * 2]
    assert arrow_array(messages).type == pa.array(messages).type
    assert arrow_array([[1, 2], [3]]).type == pa.list_(pa.int64())
    assert arrow_array([{"a": None}]).type == arrow_array([[1, 2.5]]).type == JsonType()
    assert arrow_array([[1, 2.5]]).to_pylist()[0][0].__class__ is int


def test_messages_of_arrow_s_structs_lose_the_keys_that_others_gave_them_and_json_s_keep_theirs() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = [{"prompt": [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "1"}]}]
    padded = pa.Table.from_pylist(rows)
    assert padded.to_pylist()[0]["prompt"][0]["tool_calls"] is None
    assert prepare(padded, "prompt", "x").column("prompt").to_pylist() == [rows[0]["prompt"]]
    own = [{"prompt": [{"role": "user", "content": "a", "name": None}]}]
    assert prepare(table_from(own), "prompt", "x").column("prompt").to_pylist() == [own[0]["prompt"]]
    assert without_none({"a": [{"b": None}], "c": None}) == {"a": [{}]}


def test_ids_are_those_of_the_messages_as_given() -> None:
    plain = [{"role": "user", "content": "a"}]
    called = [*plain, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    alone = prepare(table_from([{"prompt": plain}]), "prompt", "x").column("prompt_id").to_pylist()
    beside = prepare(table_from([{"prompt": called}, {"prompt": plain}]), "prompt", "x").column("prompt_id").to_pylist()
    assert beside[1:] == alone


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_an_array_keeps_the_columns_that_its_first_row_lacks_also_after_a_byte_order_mark(
    suffix: str, tmp_path: Path
) -> None:
    content = "\ufeff" + json.dumps([{"prompt": "a"}, {"prompt": "b", "answer": "7"}], indent=1)
    rows = read_rows(written(tmp_path / f"rows.{suffix}", content)).to_pylist()
    assert rows == [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "7"}]


def test_lines_after_a_byte_order_mark_and_utf_16_are_read(tmp_path: Path) -> None:
    lines = '{"prompt": "ä"}\n{"prompt": "b"}\n'
    for content in ("\ufeff" + lines).encode(), lines.encode("utf-16"):
        assert read_rows(written(tmp_path / "rows.jsonl", content)).column("prompt").to_pylist() == ["ä", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '["a", "b"]', r"entry 1 must be a JSON object; got str"),
        ("a.json", "[1]", r"entry 1 must be a JSON object; got int"),
        ("a.jsonl", '[{"prompt": "a"}, ["b"]]', r"entry 2 must be a JSON object; got list"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]', r"line 2 must be a JSON object; got list"),
        ("a.json", '{\n "prompt": "a"\n}', "a single object over several lines"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud800"}', r"line 2 holds half of a surrogate pair, '\\ud800'"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe4"}', r"line 2 is not UTF-8 \(byte 0xe4\)"),
        ("a.csv", b"prompt\na\n\xe4\n", r"line 3 is not UTF-8"),
        ("a.csv", "prompt,prompt\na,b\n", "must have each column once; there are several 'prompt'"),
        ("a.jsonl", '{"x": 1}\n{"x": "a"}', r"row 2 holds 'a', unlike those before it"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_where(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(written(tmp_path / name, content))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"prompt": "\ud800"}], r"row 2 of the column 'prompt' holds half of a surrogate pair"),
        (["a", "\ud800"], r"row 2 of the column 'prompt' holds half of a surrogate pair"),
        ([{"prompt": "a", "x": {1: "b"}}], r"row 1\s+holds \{1: 'b'\}, a dict"),
        ([{"prompt": "a", "x": object()}], r"must hold texts, numbers, or lists"),
        ([{"prompt": "a", "x": {"b": b"1"}}, {"prompt": "a", "x": {"c": b"1"}}], "row 2 holds .* unlike those before"),
    ],
)
def test_a_row_that_no_column_can_hold_is_named(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        table_from(rows)


# -- CSV -------------------------------------------------------------------------------------------------------------


def test_a_cell_of_csv_is_the_text_that_the_file_says_and_plain_numbers_are_numbers(tmp_path: Path) -> None:
    content = (
        "prompt,answer,day,empty,truth,price,stars,share,code\n"
        'a,007,2024-01-31,,true,4.50,3,0.5,nan\n"b\n2",12,31.01.2024,,false,4,,1.25,NA\n'
    )
    assert read_rows(written(tmp_path / "a.csv", content)).to_pylist() == [
        {"prompt": "a", "answer": "007", "day": "2024-01-31", "empty": None, "truth": "true"}
        | {"price": "4.50", "stars": 3, "share": 0.5, "code": "nan"},
        {"prompt": "b\n2", "answer": "12", "day": "31.01.2024", "empty": None, "truth": "false"}
        | {"price": "4", "stars": None, "share": 1.25, "code": "NA"},
    ]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ";"), ("csv", "\t"), ("csv", "|"), ("tsv", "\t")])
def test_columns_are_separated_as_the_header_shows(suffix: str, delimiter: str, tmp_path: Path) -> None:
    content = f'prompt{delimiter}"answer, whole"\na, b and c{delimiter}"4,5"\n"d{delimiter}e"{delimiter}f, g\n'
    rows = read_rows(written(tmp_path / f"a.{suffix}", content)).to_pylist()
    assert [list(row.values()) for row in rows] == [["a, b and c", "4,5"], [f"d{delimiter}e", "f, g"]]


def test_a_column_alone_may_hold_semicolons(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "a.csv", "prompt\na; b\nc\n")).column("prompt").to_pylist() == ["a; b", "c"]


# -- objects ---------------------------------------------------------------------------------------------------------


class Frame:
    """A frame that hands its columns over as Arrow does, such as Polars'; texts are views."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def to_arrow(self) -> pa.Table:
        return self.table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize("wrap", [Frame, lambda table: table])
def test_views_of_polars_and_arrow_are_stored_whole(wrap: Any, tmp_path: Path) -> None:
    columns = {
        "prompt": pa.array(["a", "b"], pa.string_view()),
        "inner": pa.array([["x"], None], pa.list_(pa.string_view())),
        "views": pa.array([[1], [2, 3]], pa.list_view(pa.int64())),
        "bytes": pa.array([b"1", None], pa.binary_view()),
    }
    rows = stored(table_from(wrap(pa.table(columns))), tmp_path)
    assert rows == [
        {"prompt": "a", "inner": ["x"], "views": [1], "bytes": b"1"},
        {"prompt": "b", "inner": None, "views": [2, 3], "bytes": None},
    ]


def test_a_transform_and_chosen_columns_of_a_dataset_hold() -> None:
    given = datasets.Dataset.from_dict({"q": ["a", "b"], "answer": [1, 2]})
    asked = given.with_transform(lambda rows: {"prompt": [f"Q: {q}" for q in rows["q"]]})
    assert table_from(asked).to_pylist() == [{"prompt": "Q: a"}, {"prompt": "Q: b"}]
    assert table_from(given.with_format(columns=["q"])).column_names == ["q"]
    assert table_from(given.with_format("numpy")).to_pylist() == given.to_list()


def test_a_frame_of_pandas_keeps_lists_dates_and_missing_values() -> None:
    frame = pd.DataFrame({"prompt": ["a", "b"], "ids": [np.array([1, 2]), np.array([3])], "x": ["t", None]})
    frame["day"] = pd.to_datetime(["2024-01-31", None])
    rows = table_from(frame).to_pylist()
    assert [row["ids"] for row in rows] == [[1, 2], [3]]
    assert [row["x"] for row in rows] == ["t", None] and rows[1]["day"] is None
    assert rows[0]["day"].isoformat() == "2024-01-31T00:00:00"


def test_parquet_with_json_of_arrow_s_own_is_read(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "x": pa.array(['{"b": 1}'], pa.json_())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")).to_pylist() == [{"prompt": "a", "x": {"b": 1}}]


def test_a_column_that_python_itself_passes_is_refused_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"a column named 'self': .* data\.columns: \{itself: self\}"):
        prepare(table_from([{"prompt": "a", "self": 1}]), "prompt", "x")


def test_whole_numbers_stay_whole_where_other_rows_hold_fractions(tmp_path: Path) -> None:
    """`str(answer) in completion` is how rewards compare: 18 must not become 18.0 by what another row holds."""
    values = [18, 0.5, None, 2**53 + 1]
    table = read_rows(written(tmp_path / "rows.jsonl", "\n".join(json.dumps({"answer": value}) for value in values)))
    assert [repr(row["answer"]) for row in stored(table, tmp_path)] == list(map(repr, values))


def test_cells_of_csv_may_be_longer_than_pythons_reader_allows(tmp_path: Path) -> None:
    long = "x, y" * 40_000
    table = read_rows(written(tmp_path / "rows.csv", f'prompt;n\n"{long}";1\n'))
    assert table.to_pylist() == [{"prompt": long, "n": 1}]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("depth", [960, 100_000])
def test_rows_nested_too_deeply_are_named(suffix: str, depth: int, tmp_path: Path) -> None:
    row = f'{{"prompt": {"[" * depth}{"]" * depth}}}'
    text = f"[{row}]" if suffix == "json" else f'{{"prompt": "a"}}\n{row}'
    with pytest.raises(DataError, match=r"(line|entry) [12] "):
        read_rows(written(tmp_path / f"rows.{suffix}", text))


def test_a_parquet_column_of_texts_that_are_not_utf_8_is_refused_when_it_is_read(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet"):
        read_rows(str(tmp_path / "rows.parquet"))
