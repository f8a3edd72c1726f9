"""The suite of every family, run over one that is not the package's own, as its page tells a user to do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from raftune.config.load import load_config, merge, validate
from raftune.data.images import png_of
from raftune.errors import ConfigChanged, ConfigError
from raftune.policies.registry import family_of
from raftune.runtime.evaluation_target import evaluation_of, parse_target
from raftune.runtime.run import run, verify
from raftune.testing import Claim, FamilyCase, begin, claims
from tests.runs.kill import tree

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
# A reward that needs no process of its own, for what does not hang on the reward.
CHEAP: dict[str, Any] = {
    "report": False,
    "rewards": {"reward_funcs": ["file_size"]},
    "evaluation": {"reward_funcs": [], "num_prompts": 2, "num_generations": 1},
}
PICTURE = Image.linear_gradient("L").resize((8, 8))


def configured(**changes: Any) -> Any:
    """The example's own configuration, with these changes."""
    plain = load_config([EXAMPLE / "run.yaml"]).model_dump(mode="json")
    return validate(merge([plain, changes]))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> FamilyCase:
    folder = tmp_path_factory.mktemp("digits")
    return begin(configured(), folder, prompts=[3, 1, 4], answer=PICTURE, completion=png_of(PICTURE))


@pytest.mark.parametrize("claim", claims(family_of(configured())), ids=lambda claim: claim.__name__)
def test_the_example_keeps_every_promise_of_a_family(case: FamilyCase, claim: Claim, tmp_path: Path) -> None:
    claim(case, tmp_path)


def test_a_family_is_one_short_file() -> None:
    assert len((EXAMPLE / "family.py").read_text().splitlines()) < 150


def small(root: Path) -> Any:
    return configured(output_dir=str(root), num_rounds=2, report=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of the example."""
    root = tmp_path_factory.mktemp("finished") / "run"
    run(small(root))
    return root


def test_the_example_improves_by_its_reward_and_by_a_judge_that_it_never_learned_from(finished: Path) -> None:
    """With fixed seeds; the 95 % intervals of start and end lie apart, which by chance one run in 10^4 would show."""
    first, last = (json.loads((finished / f"round-{n:04d}/evaluate/metrics.json").read_text()) for n in (0, 2))
    assert last["reward"]["low"] > first["reward"]["high"]
    assert last["held_out"]["low"] > first["held_out"]["high"]


def test_what_was_interrupted_ends_as_if_it_had_not_been(finished: Path, tmp_path: Path) -> None:
    def interrupt(kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage_begin" and (facts["round"], facts["stage"]) == (2, "train"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small(tmp_path / "run"), observe=interrupt)
    run(small(tmp_path / "run"))
    assert tree(tmp_path / "run") == tree(finished)
    assert verify(tmp_path / "run") == []


def test_a_round_of_the_example_is_evaluated_like_any_model(finished: Path, tmp_path: Path) -> None:
    plain = evaluation_of(parse_target(f"{finished}@last"), [], {"output_dir": str(tmp_path / "evaluated")})
    run(plain)
    found, known = (
        path / "evaluate/metrics.json" for path in (tmp_path / "evaluated/round-0000", finished / "round-0002")
    )
    assert json.loads(found.read_text())["reward"] == json.loads(known.read_text())["reward"]


def test_an_option_that_the_family_does_not_have_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.options\.wrong_label is not a field; did you mean 'wrong_labels'"):
        run(configured(**CHEAP, output_dir=str(tmp_path / "run"), policy={"options": {"wrong_label": 0.1}}))


def test_an_option_that_the_family_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.top_p means nothing to the digits family; got 0\.5"):
        run(configured(**CHEAP, output_dir=str(tmp_path / "run"), sampling={"top_p": 0.5}))


def test_other_code_of_the_family_is_another_run(tmp_path: Path) -> None:
    """The file enters the keys: what another version generated is not gone on with in silence."""
    own = tmp_path / "family.py"
    own.write_text((EXAMPLE / "family.py").read_text().replace("epochs=60", "epochs=1"))
    mine = {"policy": {"family": f"{own}:Digits"}, "num_rounds": 0}
    first = configured(**CHEAP, **mine, output_dir=str(tmp_path / "run"))
    run(first)
    own.write_text(own.read_text().replace("std=0.1", "std=0.2"))
    with pytest.raises(ConfigChanged, match=r"the family's classes have changed .*--from 0/start"):
        run(first)
