"""What is generated depends on the plan alone: seeds, ids and the order of prompts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raftune.errors import OutOfMemory
from raftune.records import derive_seed
from raftune.runtime.run import resume, run
from raftune.stages.plan import prompts_of_round, read_chunk, take
from raftune.store.parquet import write_table
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.kill import difference, tree


def samples_of(root: Path, round_: int, name: str = "generate") -> pa.Table:
    folder = RunFolder(root).folder(round_, name)
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("chunk-*.parquet"))])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of different seeds over the same evaluation."""
    folder = tmp_path_factory.mktemp("two")
    for seed in (0, 1):
        run(tiny.config(folder / str(seed), seed=seed), tiny.objects())
    return folder / "0", folder / "1"


def test_sample_ids_are_as_planned_and_unique_in_the_whole_run(two: tuple[Path, Path]) -> None:
    root = two[0]
    ids: list[str] = []
    for round_, name, version in (
        (1, "generate", "round-0000"),
        (2, "generate", "round-0001"),
        (2, "evaluate/generate", "round-0002"),
    ):
        table = samples_of(root, round_, name)
        plan = RunFolder(root).folder(round_, name.replace("generate", "plan"))
        chunks = [read_chunk(plan, index) for index in range(len(list(plan.parent.glob("generate/chunk-*"))))]
        planned = [
            chunk.sample_id(p, k)
            for chunk in chunks
            for i, p in enumerate(chunk.prompts)
            for k in range(len(chunk.seeds[i]))
        ]
        seeds = [seed for chunk in chunks for row in chunk.seeds for seed in row]
        assert table.column("sample_id").to_pylist() == planned
        assert table.column("seed").to_pylist() == seeds
        assert set(table.column("version").to_pylist()) == {version}
        ids += planned
    assert len(set(ids)) == len(ids) == 2 * 8 * 4 + 4 * 2


def test_a_training_seed_depends_on_run_seed_round_prompt_and_k(two: tuple[Path, Path]) -> None:
    for root, seed in zip(two, (0, 1), strict=True):
        for round_ in (1, 2):
            for row in samples_of(root, round_).select(["prompt_id", "k", "seed"]).to_pylist():
                assert row["seed"] == derive_seed("run", seed, round_, row["prompt_id"], row["k"])


def test_evaluation_seeds_are_the_same_in_every_round_and_run(two: tuple[Path, Path]) -> None:
    columns = [
        samples_of(root, round_, "evaluate/generate").select(["prompt_id", "k", "seed"])
        for root in two
        for round_ in (0, 1, 2)
    ]
    assert all(other.equals(columns[0]) for other in columns[1:])
    training = {
        seed for root in two for round_ in (1, 2) for seed in samples_of(root, round_).column("seed").to_pylist()
    }
    assert not training & set(columns[0].column("seed").to_pylist())


@pytest.mark.slow
def test_completions_do_not_depend_on_the_size_of_chunks(tmp_path: Path) -> None:
    for size in (1, 3, 8):
        run(tiny.config(tmp_path / str(size), sampling={"chunk_size": size}), tiny.objects())
    tables = [samples_of(tmp_path / str(size), 2) for size in (1, 3, 8)]
    assert [len(list((tmp_path / str(size)).glob("round-0002/generate/chunk-*"))) for size in (1, 3, 8)] == [8, 3, 1]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


@pytest.mark.parametrize(("total", "per_round"), [(7, 3), (8, 4), (5, 5), (3, 8), (10, 7)])
def test_prompts_come_without_replacement_and_never_twice_in_a_round(total: int, per_round: int) -> None:
    rounds = [prompts_of_round(total, per_round, r, seed=4) for r in range(1, 41)]
    for asked in rounds:
        assert len(set(asked)) == len(asked) == min(total, per_round)
        assert set(asked) <= set(range(total))
    counts = Counter(row for asked in rounds for row in asked)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_within_an_epoch_every_prompt_is_asked_once() -> None:
    asked = [row for r in (1, 2, 3, 4) for row in prompts_of_round(12, 3, r, seed=0)]
    assert sorted(asked) == list(range(12))


def test_the_order_of_prompts_depends_on_the_seed() -> None:
    assert prompts_of_round(50, 50, 1, seed=0) != prompts_of_round(50, 50, 1, seed=1)
    assert prompts_of_round(50, 50, 1, seed=0) == prompts_of_round(50, 50, 1, seed=0)


def test_rows_are_taken_in_the_order_that_is_asked_across_groups(tmp_path: Path) -> None:
    write_table(pa.table({"row": list(range(20))}), tmp_path / "rows.parquet", rows_per_group=3)
    wanted = [19, 0, 7, 8, 2]
    assert take(tmp_path / "rows.parquet", wanted).column("row").to_pylist() == wanted


# -- a memory that does not suffice ------------------------------------------------------------------------------------


def remembering(memory: int) -> dict[str, Any]:
    options = {"num_prompts": 4, "num_answers": 5, "memory": memory}
    return {"policy": {"family": "tests.runs.tiny:Dressed", "options": options}, "sampling": {"batch_size": 64}}


def test_out_of_memory_halves_the_batch_and_puts_it_on_record(tmp_path: Path) -> None:
    said: list[str] = []

    def listen(kind: str, facts: dict[str, Any]) -> None:
        said.extend(facts.get("notes", ()) if kind == "chunk" else ())

    root = tmp_path / "run"
    run(tiny.config(root, **remembering(20)), tiny.objects(), observe=listen)
    assert "chunk 0: out of memory at batch 64; generated again at 32" in said
    assert "chunk 0: out of memory at batch 32; generated again at 16" in said
    assert (root / "round-0001/generate/chunk-00000.batch.json").is_file()
    assert pq.read_schema(root / "round-0001/generate/chunk-00000.parquet").metadata == {b"batch_size": b"16"}
    commit = RunFolder(root).commit(1, "generate")
    assert commit is not None
    assert set(commit.files) == {f"chunk-0000{i}.{kind}" for i in (0, 1) for kind in ("batch.json", "parquet")}


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_is_cut_after_an_out_of_memory_goes_on_in_the_batch_on_record(tmp_path: Path, after: int) -> None:
    run(tiny.config(tmp_path / "whole", **remembering(20)), tiny.objects())
    cut = tiny.config(tmp_path / "cut", **remembering(20))
    seen: list[int] = []

    def leave(kind: str, facts: dict[str, Any]) -> None:
        if kind == "chunk" and facts["stage"] == "generate":
            seen.append(facts["chunk"])
            if len(seen) == after:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cut, tiny.objects(), observe=leave)
    resume(tmp_path / "cut", tiny.objects())
    assert difference(tree(tmp_path / "whole"), tree(tmp_path / "cut")) == ""


def test_out_of_memory_at_one_row_ends_the_run_in_words(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="1 rows do not fit"):
        run(tiny.config(tmp_path / "run", **remembering(0)), tiny.objects())
