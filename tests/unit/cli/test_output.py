"""Lines and tables on a narrow terminal: nothing is broken inside a word, and a command stays whole."""

from __future__ import annotations

from raftune.cli.output import PlainTable, fitted, json_line


def test_a_line_breaks_between_words_and_hangs_below_what_it_says() -> None:
    line = "  details    one two three four five six seven"
    assert fitted(line, 26) == ["  details    one two three", "             four five six", "             seven"]
    assert fitted(line, None) == fitted(line, 80) == [line]
    long = "a" * 50
    assert fitted(f"see {long} there", 20) == ["see", long, "there"]  # a word that is too long is left to the terminal


def test_a_command_stays_whole_so_that_it_can_be_pasted() -> None:
    line = "  next       raftune train run.yaml --policy.model a/long/path/to/a/model"
    assert fitted(line, 30) == [line]
    quoted = "there is no file. `raftune init run.yaml` writes one."
    assert any("`raftune init run.yaml`" in part for part in fitted(quoted, 30))


def test_the_last_column_of_a_table_wraps_and_a_table_of_numbers_is_stacked() -> None:
    grid = PlainTable("name", "meaning")
    grid.add("kl", "how far it has moved from the start")
    assert [line.plain for line in grid.lines(30)] == [
        "name  meaning",
        "kl    how far it has moved",
        "      from the start",
    ]
    grid = PlainTable("round", "reward", "best of 4", right=frozenset({1, 2}))
    grid.add("start", "-2.246", "1.253")
    assert [line.plain for line in grid.lines(20)] == ["start", "  reward     -2.246", "  best of 4  1.253"]
    assert all(len(line.plain) <= 40 for line in grid.lines(40))


def test_a_line_of_json_has_null_for_what_is_no_finite_number() -> None:
    assert json_line({"é": [float("nan"), {"x": float("-inf")}, 1.5]}) == '{"é": [null, {"x": null}, 1.5]}'
