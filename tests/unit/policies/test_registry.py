"""A family that somebody wrote themselves is told, in words, what it lacks and what it does wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raftune.config import RunConfig, validate
from raftune.errors import ConfigError, ModelError
from raftune.policies.registry import family_of
from raftune.protocols import Chunk
from raftune.records import Sample
from raftune.runtime.run import run
from raftune.testing import begin, claims
from tests.runs import tiny

OPTIONS = {"num_prompts": 4, "num_answers": 5}


class Reversed(tiny.Dressed):
    """Draws what it should, in another order."""

    def generate(self, chunk: Chunk) -> list[Sample]:
        return super().generate(chunk)[::-1]


class Short(tiny.Dressed):
    """Forgets a sample."""

    def generate(self, chunk: Chunk) -> list[Sample]:
        return super().generate(chunk)[:-1]


class Chatty(tiny.Dressed):
    """Gives a column that it did not declare."""

    def generate(self, chunk: Chunk) -> list[Sample]:
        return [
            Sample(s.id, s.prompt_id, s.k, s.source, s.seed, s.version, s.completion, {"mood": "fine"})
            for s in super().generate(chunk)
        ]


class WrongType(tiny.Dressed):
    """Gives a text where it declared a number."""

    def generate(self, chunk: Chunk) -> list[Sample]:
        return [Sample(s.id, s.prompt_id, s.k, s.source, s.seed, s.version, "three") for s in super().generate(chunk)]


class Silent(tiny.Dressed):
    """Gives nothing where it declared that there is always something."""

    def generate(self, chunk: Chunk) -> list[Sample]:
        return [Sample(s.id, s.prompt_id, s.k, s.source, s.seed, s.version, None) for s in super().generate(chunk)]


class Unseeded(tiny.Dressed):
    """Draws something else every time."""

    calls = 0

    def generate(self, chunk: Chunk) -> list[Sample]:
        Unseeded.calls += 1
        return [
            Sample(s.id, s.prompt_id, s.k, s.source, s.seed, s.version, Unseeded.calls % 5)
            for s in super().generate(chunk)
        ]


def configured(family: str, root: Path = Path("unused")) -> RunConfig:
    return tiny.config(root, policy={"family": family, "options": OPTIONS})


def here(name: str) -> str:
    return f"{__name__}:{name}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Reversed", r"Reversed\.generate must return its samples prompt by prompt, k ascending.*sample 0 has id"),
        ("Short", r"Short\.generate must return a sample for each seed of each prompt of the chunk, 8 here; got 7"),
        ("Chatty", r"columns that Chatty\.payload declares \(completion\); sample .* has mood"),
        ("WrongType", r"the payload of WrongType must fit the types that it declares"),
        ("Silent", r"Silent\.payload says that completion is never null"),
    ],
)
def test_samples_that_do_not_match_the_plan_end_the_run_with_an_error(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        run(configured(here(name), tmp_path / "run"), tiny.objects())


def test_the_suite_finds_a_family_that_ignores_its_seeds(tmp_path: Path) -> None:
    case = begin(configured(here("Unseeded")), tmp_path, prompts=[0, 1], answer=1)
    [claim] = [c for c in claims(case.family) if c.__name__.startswith("the_same_seeds")]
    with pytest.raises(AssertionError, match="seed every generator from a sample's seed"):
        claim(case, tmp_path)


# -- a class that is not whole ----------------------------------------------------------------------------------------

WHOLE = """
import pyarrow as pa

class Mine:
    media = "category"
    payload = pa.schema([("completion", pa.int64())])
    @classmethod
    def start(cls, config, out, model=None, tokenizer=None): (out / "model.txt").touch()
    @classmethod
    def load(cls, config, folder, start): return cls()
    @classmethod
    def verify(cls, start): ...
"""


def family(tmp_path: Path, text: str, name: str = "Mine") -> Any:
    (tmp_path / "mine.py").write_text(text)
    policy = {"family": f"{tmp_path / 'mine.py'}:{name}"}
    return family_of(validate({"data": {"prompts": "p"}, "policy": policy}))


def test_what_a_class_lacks_is_named_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must have media, payload, .*; it lacks payload, load, verify"):
        family(tmp_path, "class Mine:\n    media = 'image'\n    def start(self): ...\n")


def test_what_a_loaded_policy_lacks_is_named_before_generation(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(WHOLE)
    config = tiny.config(tmp_path / "run", policy={"family": f"{tmp_path / 'mine.py'}:Mine"})
    with pytest.raises(ConfigError, match=r"a Mine\) must have .*; it lacks nbytes, generate, encode_completion"):
        run(config, tiny.objects())


def test_a_start_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(WHOLE.replace('(out / "model.txt").touch()', "..."))
    config = tiny.config(tmp_path / "run", policy={"family": f"{tmp_path / 'mine.py'}:Mine"})
    with pytest.raises(ModelError, match="must write its start model into the folder `out`; it wrote nothing"):
        run(config, tiny.objects())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"category"', '"video"', r"media of .* must be one of text, messages, image, category; got 'video'"),
        ('"completion"', '"answer"', r"first column is `completion`.*; got the columns answer"),
        ('pa.schema([("completion", pa.int64())])', '["completion"]', r"must be a pyarrow\.schema .*; got list"),
        ('"category"', '"image"', r"whose media is image, must be binary: the bytes of a PNG; got int64"),
    ],
)
def test_a_declaration_that_means_nothing_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert family(tmp_path, WHOLE).payload.field(0).type == pa.int64()
    with pytest.raises(ConfigError, match=words):
        family(tmp_path, WHOLE.replace(old, new))


def test_a_file_that_raises_when_it_is_read_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.py, line 3 raised ZeroDivisionError when it was read"):
        family(tmp_path, "import math\n\nx = 1 / 0\n")
    with pytest.raises(ConfigError, match=r"mine\.py, line 1 raised SyntaxError when it was read"):
        family(tmp_path, "class Mine\n")


def test_a_class_or_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no 'Yours'"):
        family(tmp_path, WHOLE, "Yours")
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.py"):
        family_of(validate({"data": {"prompts": "p"}, "policy": {"family": "nowhere.py:Mine"}}))


def test_dataclasses_and_modules_beside_the_file_work_as_in_a_script(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text("WIDTH = 3\n")
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\nfrom beside_mine import WIDTH\n"
    )
    text += WHOLE.replace(
        "class Mine:", "@dataclass\nclass Part:\n    n: int = WIDTH\n\nclass Mine:\n    part = Part()"
    )
    assert family(tmp_path, text).part.n == 3
