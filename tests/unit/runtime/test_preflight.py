"""What cannot work is refused before anything is generated, with what was given and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raftune.errors import ConfigError
from raftune.policies.tabular.policy import Tabular
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from tests.runs import tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": {"num_generations": 1}, "selection": {"all_equal": "skip"}},
            r"all_equal: skip can never select .* got sampling\.num_generations = 1\. Raise it",
        ),
        (
            {"sampling": {"num_generations": 1}, "selection": {"margin": 0.5}},
            r"margin can never be reached by one sample a prompt.* got 0\.5",
        ),
        ({"selection": {"rule": "top_m", "m": 4}}, r"selection\.m must be less than the candidates .* got 4 of 4"),
        ({"selection": {"rule": "random", "m": 5}}, r"selection\.m must not exceed the candidates .* got 5 of 4"),
        ({"evaluation": {"best_by": "polite"}}, r"best_by must be one of reward, value; got 'polite'"),
        ({"evaluation": {"best_by": "value", "num_prompts": 0}}, r"best_by needs evaluations; got 'value'"),
        ({"evaluation": {"best_by": "held_out"}}, r"best_by must be one of reward, value; got 'held_out'"),
    ],
)
def test_what_can_never_work_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny.config(tmp_path / "run", **changes), tiny.objects())
    assert not list((tmp_path / "run").glob("round-*"))


def test_another_source_in_the_pool_makes_a_margin_possible(tmp_path: Path) -> None:
    changes = {"sampling": {"num_generations": 1, "candidate_columns": ["human"]}, "selection": {"margin": 0.01}}
    assert run(tiny.config(tmp_path / "run", num_rounds=1, **changes), tiny.objects()).rounds == 1


def test_a_run_without_a_reward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reward_funcs must name at least one reward; got none"):
        run(tiny.config(tmp_path / "run"), PythonObjects(train=tiny.train, held_out=tiny.held_out))


def test_beta_is_refused_for_a_family_without_likelihoods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Tabular, "log_probs")
    with pytest.raises(ConfigError, match=r"beta must be 0 for a family that knows no likelihoods; got 0\.1"):
        run(tiny.config(tmp_path / "run", selection={"beta": 0.1}), tiny.objects())


def test_all_findings_are_given_at_once(tmp_path: Path) -> None:
    changes = {"sampling": {"num_generations": 1}, "selection": {"margin": 0.5}, "evaluation": {"best_by": "polite"}}
    with pytest.raises(ConfigError) as caught:
        run(tiny.config(tmp_path / "run", **changes), tiny.objects())
    assert len(str(caught.value).splitlines()) == 2


class Painted(tiny.Dressed):
    """A family of images, as far as can be seen before it draws."""

    media = "image"
    payload = pa.schema([("completion", pa.binary())])


@pytest.mark.parametrize("field", ["min_length", "max_length"])
def test_a_window_of_lengths_is_refused_for_images_before_generation(field: str, tmp_path: Path) -> None:
    policy = {"family": f"{__name__}:Painted", "options": {"num_prompts": 4, "num_answers": 5}}
    with pytest.raises(ConfigError, match=rf"selection\.{field} is about lengths, and an image has none; got 5"):
        run(tiny.config(tmp_path / "run", policy=policy, selection={field: 5}), tiny.objects())
    assert not list((tmp_path / "run").glob("round-*"))


def needs_human(prompts: list[Any], completions: list[Any], human: list[Any], **columns: Any) -> list[float]:
    return [float(text == str(answer)) for text, answer in zip(completions, human, strict=True)]


def needs_reference(completions: list[Any], reference: list[Any]) -> list[float]:
    return [0.0 for _ in completions]


REFERENCE = f"{Path(__file__)}:needs_reference"


@pytest.mark.parametrize(
    ("objects", "changes", "field", "words"),
    [
        ([needs_reference], {}, "rewards", "'reference', which is no column of the prompts; there are: human."),
        (
            [],
            {"reward_funcs": REFERENCE},
            "rewards",
            "'reference', which is no column of the prompts; there are: human.",
        ),
        ([], {"reward_funcs": "answer"}, "rewards", "'answer', which is no column of the prompts; there are: human."),
        ([needs_human], {"reward_funcs": [REFERENCE]}, "evaluation", "'reference', which is no column of the held-out"),
    ],
)
def test_a_reward_whose_column_the_prompts_lack_is_refused_before_anything_is_generated(
    objects: list[Any], changes: dict[str, Any], field: str, words: str, tmp_path: Path
) -> None:
    settings = tiny.config(tmp_path / "run", **{field: changes})
    given = PythonObjects(train=tiny.train, held_out=tiny.held_out, rewards=objects)
    with pytest.raises(ConfigError) as caught:
        run(settings, given)
    assert str(caught.value).startswith(f"{field}.reward_funcs: ") and words in str(caught.value)
    assert not (tmp_path / "run/round-0001").exists()
    assert not (tmp_path / "run/round-0000/data/commit.json").exists()


def test_a_column_that_an_option_a_default_or_the_data_gives_is_no_fault(tmp_path: Path) -> None:
    rewards = {"reward_funcs": [{"spec": REFERENCE, "options": {"reference": "one for all"}}]}
    assert run(tiny.config(tmp_path / "run", num_rounds=1, rewards=rewards), tiny.objects(needs_human)).rounds == 1


def test_a_reward_is_checked_against_the_columns_that_a_run_has_already(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run", num_rounds=0), tiny.objects())
    with pytest.raises(ConfigError, match=r"needs_reference needs 'reference', .* there are: human\."):
        run(tiny.config(tmp_path / "run", num_rounds=1), tiny.objects(needs_reference))
