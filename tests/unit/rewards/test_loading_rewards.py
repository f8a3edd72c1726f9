"""From a spec to a reward, and what is said where there is none."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raftune.config.rewards import RewardsConfig, RewardSpec
from raftune.errors import ConfigError, RewardError
from raftune.rewards import RewardBatch, fingerprint, load_rewards
from raftune.rewards.loading import load_reward
from raftune.rewards.resolve import FunctionReward, resolve

RULES = '''
"""Rewards of a project."""
import beside

LIMIT = 3

def short(completions, **kwargs):
    return [float(len(text) <= LIMIT) for text in completions]

def scaled(completions, factor=1.0, **kwargs):
    return [factor * beside.ONE for _ in completions]

class Judge:
    def __init__(self, best="a"):
        self.best = best
    def __call__(self, completions, **kwargs):
        return [float(text == self.best) for text in completions]

def make(value):
    return lambda completions, **kwargs: [value] * len(completions)
'''


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("ONE = 1.0\n")
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


def values(spec: RewardSpec | str) -> list[float | None]:
    """Resolved and called in this process: hosting is another test's claim."""
    reward = resolve(RewardSpec.model_validate(spec))
    return reward(prompts=["q", "q"], completions=["a", "bbbb"], answer=["1", "1"])


def test_a_function_of_a_file_may_import_what_lies_beside_it(rules: Path) -> None:
    assert values(f"{rules}:short") == [1.0, 0.0]
    assert values(f"{rules}:scaled") == [1.0, 1.0]


def test_options_are_further_keyword_arguments_of_a_function(rules: Path) -> None:
    assert values(RewardSpec(spec=f"{rules}:scaled", options={"factor": 3.0})) == [3.0, 3.0]


def test_a_class_is_made_with_the_options_and_so_is_what_is_called(rules: Path) -> None:
    assert values(RewardSpec(spec=f"{rules}:Judge", options={"best": "bbbb"})) == [0.0, 1.0]
    assert values(RewardSpec(spec=f"{rules}:make()", options={"value": 7})) == [7, 7]


def test_a_module_is_found_by_colon_and_by_dots(rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(rules.parent))
    assert values("rules:short") == values("rules.short") == [1.0, 0.0]


def test_built_in_rewards_take_their_options() -> None:
    assert values(RewardSpec(spec="length", options={"max": 2, "unit": "characters"})) == [0.0, -1.0]
    assert resolve(RewardSpec(spec="answer", name="right")).name == "right"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{folder}/rules.py:shorter", r"no function 'shorter' in .*; did you mean 'short'\?"),
        ("{folder}/rules.py:zzz", "there are: Judge, make, scaled, short"),
        ("{folder}/rules.py", "names no function: write .*rules.py:function; there are: Judge, make"),
        ("{folder}/rule.py:short", r"no file .*; did you mean '.*rules\.py'\?"),
        ("{folder}/rules.py:LIMIT", "is int 3, not a function; there are: Judge"),
        (
            "no_such_module_here:f",
            r"no module 'no_such_module_here' .* give a file as no_such_module_here\.py:function",
        ),
        ("lenght", r"no reward 'lenght'; did you mean 'length'\?"),
        ("./no/such/folder", "no folder './no/such/folder'"),
    ],
)
def test_a_spec_that_names_nothing_is_refused_with_what_there_is(rules: Path, spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(RewardSpec(spec=spec.format(folder=rules.parent)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"taget": 3}, r"rewards.options: length has no option 'taget'; did you mean 'target'\?"),
        ({"fingerprint": "x"}, "rewards.options: length has no option 'fingerprint'; it has target, min, max, unit"),
        ({"target": "long"}, "rewards.options.target of length: input should be a valid number.*; got 'long'"),
        ({"target": 3, "unit": "lines"}, "rewards.options.unit of length.*; got 'lines'"),
    ],
)
def test_an_option_that_a_built_in_does_not_know_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(RewardSpec(spec="length", options=options))


def test_a_file_that_cannot_be_run_is_named_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for text, said in (
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError"),
        ("exit(3)", "SystemExit: 3"),
    ):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(RewardError, match=said):
            resolve(RewardSpec(spec=f"{tmp_path}/broken.py:f"))


def test_what_is_neither_spec_nor_callable_is_refused() -> None:
    with pytest.raises(ConfigError, match="must hold callables, models or specs; got int 3"):
        load_reward(3)


def test_every_object_needs_its_processing_class_or_none_does() -> None:
    with pytest.raises(ConfigError, match="reward_processing_classes must match reward_funcs; got 2 for 1 rewards"):
        load_rewards(RewardsConfig(), [print], tokenizers=[None, None])


def test_configured_rewards_come_before_objects_and_keep_their_weights() -> None:
    config = RewardsConfig(reward_funcs=({"spec": "length", "options": {"max": 1}, "weight": 2.0},))
    with load_rewards(config, [lambda completions, **kwargs: [1.0] * len(completions)], weights=[0.5]) as rewards:
        assert (rewards.names, rewards.weights) == (("length", "lambda"), (2.0, 0.5))
        assert rewards.score(RewardBatch(["q"], ["a b"]))[0].value == -1.5


def test_a_files_fingerprint_follows_its_bytes_the_function_and_the_options(rules: Path) -> None:
    def of(spec: str, **options: Any) -> str:
        return resolve(RewardSpec(spec=spec, options=options)).fingerprint

    before = [
        of(f"{rules}:short"),
        of(f"{rules}:scaled"),
        of(f"{rules}:scaled", factor=2.0),
        of(f"{rules}:make()", value=1),
    ]
    assert len(set(before)) == 4
    assert of(f"{rules}:short") == before[0]
    rules.write_text(RULES.replace("LIMIT = 3", "LIMIT = 4"))
    assert of(f"{rules}:short") != before[0]


def closing_over(limit: Any) -> Any:
    return lambda completions, **kwargs: [float(len(text) < limit) for text in completions]


def helped(completions: list[str], **kwargs: Any) -> list[float]:
    return [HELP * len(text) for text in completions]


HELP = 2.0


class Holds:
    def __init__(self, limit: Any) -> None:
        self.limit = limit

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [float(self.limit)] * len(completions)

    def method(self, completions: list[str], **kwargs: Any) -> list[float]:
        return self(completions)


def test_an_objects_fingerprint_follows_what_it_closes_over_holds_and_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = fingerprint.of_callable
    assert of(closing_over(3)) == of(closing_over(3)) != of(closing_over(4))
    assert of(Holds(3)) == of(Holds(3)) != of(Holds(4))
    assert of(Holds(3).method) == of(Holds(3).method) != of(Holds(4).method)
    assert of(partial(helped, x=1)) == of(partial(helped, x=1)) != of(partial(helped, x=2))
    assert of(closing_over(closing_over(3))) != of(closing_over(closing_over(4)))
    before = of(helped)
    monkeypatch.setitem(globals(), "HELP", 3.0)
    assert of(helped) != before


def test_an_objects_fingerprint_does_not_depend_on_addresses_clients_or_the_order_of_sets() -> None:
    of = fingerprint.of_callable
    assert of(Holds(object())) == of(Holds(object()))
    assert of(closing_over({"a", "b", "c"})) == of(closing_over({"c", "b", "a"}))
    loop: list[Any] = []
    loop.append(loop)
    assert of(closing_over(loop)) == of(closing_over(loop))


def test_code_without_a_source_is_distinguished_by_its_constants_and_names() -> None:
    made = {}
    for text in ("x < 3", "x < 4", "y < 3", "x in {'a', 'b'}"):
        space: dict[str, Any] = {}
        exec(f"def f(x=0, y=0, **kwargs): return {text}", space)
        made[text] = fingerprint.of_callable(space["f"])
    assert len(set(made.values())) == 4


def test_a_folders_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = fingerprint.of_folder(tmp_path)
    (tmp_path / "a").write_text("2")
    changed = fingerprint.of_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({before, changed, fingerprint.of_folder(tmp_path)}) == 3


def test_functions_that_take_what_they_name_say_so() -> None:
    assert FunctionReward(helped).accepts is None
    assert FunctionReward(lambda prompts, completions: []).accepts == {"prompts", "completions"}
    assert FunctionReward(helped).media == {"text", "messages", "image", "category"}


@pytest.mark.parametrize("options", [{}, {"model": "no-such-owner/no-such-model"}])
def test_a_name_missing_on_the_hub_is_one_line_without_the_clients_text(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "We couldn't connect to 'https://hub.example' to load the files. See how to run the library in offline mode."

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(page)

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    spec = RewardSpec(spec="classifier" if options else "no-such-owner/no-such-model", options=options)
    with pytest.raises(RewardError) as caught:
        load_reward(spec)
    assert "no-such-owner/no-such-model" in str(caught.value)
    assert page not in str(caught.value) and len(str(caught.value)) < 330
