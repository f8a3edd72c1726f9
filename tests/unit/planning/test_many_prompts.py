"""A plan of many prompts holds few of them at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from raftune.errors import DataError
from raftune.planning.forecast import BATCH, lengths_of
from raftune.records import Prompt
from raftune.stages.prompt_check import check_prompts, prompts_of_file
from raftune.store.parquet import write_table
from tests.builders import save_tiny

MANY = 3 * BATCH + 1


class Counting:
    """Encodes words, and keeps the size of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, prompts: Sequence[Prompt], *, for_drawing: bool) -> list[list[int]]:
        self.calls.append(len(prompts))
        return [[0] * len(str(prompt.content).split()) for prompt in prompts]


def written(path: Path, texts: list[str]) -> Path:
    ids = [f"{number}-0" for number in range(len(texts))]
    write_table(pa.table({"prompt_id": ids, "prompt": texts}), path, rows_per_group=MANY - 10)
    return path


def test_no_call_of_the_tokenizer_takes_more_than_a_batch(tmp_path: Path) -> None:
    encoder = Counting()
    texts = ["two words" if number % 2 else "one" for number in range(MANY)]
    assert lengths_of(written(tmp_path / "train.parquet", texts), encoder) == [len(text.split()) for text in texts]
    assert sum(encoder.calls) == MANY and max(encoder.calls) <= BATCH


def test_prompts_are_looked_at_one_after_another(tmp_path: Path) -> None:
    looks = check_prompts(prompts_of_file(written(tmp_path / "train.parquet", ["one"] * MANY)), [])
    assert (looks.total, looks.unlike, looks.first_unlike) == (MANY, MANY, "one")


class Batches:
    """Reads prompts that are not long, and keeps how it was asked."""

    def __init__(self) -> None:
        self.together: list[int] = []
        self.alone: list[str] = []

    def reads_all(self, prompts: Sequence[Prompt]) -> bool:
        self.together.append(len(prompts))
        return all("long" not in str(prompt.content) for prompt in prompts)

    def unread(self, prompt: Prompt) -> str | None:
        self.alone.append(prompt.id)
        if "long" in str(prompt.content):
            raise DataError(f"{prompt.id} is too long")
        return None


def test_only_prompts_of_a_batch_with_one_that_is_refused_are_looked_at_one_by_one(tmp_path: Path) -> None:
    reader = Batches()
    texts = ["long" if number == 3 else "one" for number in range(MANY)]
    looks = check_prompts(prompts_of_file(written(tmp_path / "train.parquet", texts)), [reader])
    assert (looks.total, looks.refused) == (MANY, {"3-0": "3-0 is too long"})
    assert sum(reader.together) == MANY and len(reader.alone) == max(reader.together) < MANY


PLANS = """
import json, resource, sys
from pathlib import Path
from raftune.config.load import validate
from raftune.planning import forecast

def planned(number):
    prompts = Path(sys.argv[1]) / f"{number}.jsonl"
    with prompts.open("w") as file:
        file.writelines(json.dumps({"prompt": f"say {n} and some more words"}) + "\\n" for n in range(number))
    settings = {"output_dir": sys.argv[1] + "/run", "data": {"prompts": str(prompts)}}
    settings |= {"policy": {"model": sys.argv[1] + "/model"}, "engine": {"threads": 1}}
    settings |= {"rewards": {"reward_funcs": [{"spec": "length", "options": {"target": 3}}]}}
    found = forecast(validate(settings), measured=False).prompts
    assert found.train + found.held_out == number, found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(json.dumps([planned(10), planned(50_000)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux alone")
def test_the_memory_of_a_plan_hardly_grows_with_the_number_of_prompts(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", bos=True)
    done = subprocess.run([sys.executable, "-c", PLANS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    assert many - few < 100_000, f"{few:,} kB for 10 prompts, {many:,} kB for 50,000"
