"""Any field of the configuration is a flag, and what is no field is answered with the one that was meant."""

from __future__ import annotations

import pytest

from raftune.cli.flags import read_tokens
from raftune.config.load import fields_of, merge, nested, validate
from raftune.config.run import RunConfig
from raftune.errors import ConfigError

MINIMAL = {"data": {"prompts": "p.jsonl"}, "policy": {"model": "starter"}}


def flags(*tokens: str) -> dict[str, object]:
    return read_tokens(tokens, "train", ("--from", "--json")).flags


def test_files_and_flags_may_come_in_any_order() -> None:
    given = read_tokens(["a.yaml", "--seed", "3", "b.yaml", "--training.learning_rate=1e-4"], "train")
    assert given.words == ("a.yaml", "b.yaml")
    assert given.flags == {"seed": "3", "training.learning_rate": "1e-4"}


def test_dashes_and_underscores_are_one() -> None:
    assert flags("--num-rounds", "4", "--training.learning-rate", "1") == {
        "num_rounds": "4",
        "training.learning_rate": "1",
    }


def test_a_switch_needs_no_value_and_can_be_turned_off() -> None:
    assert flags("--evaluation.kl", "--seed", "1") == {"evaluation.kl": "true", "seed": "1"}
    assert flags("--no-evaluation.kl") == {"evaluation.kl": "false"}
    assert flags("--evaluation.kl", "no") == {"evaluation.kl": "no"}


def test_a_negative_number_is_a_value() -> None:
    assert flags("--training.max_steps", "-1") == {"training.max_steps": "-1"}


def test_none_is_nothing_only_where_a_field_may_be_empty() -> None:
    assert flags("--stop.patience", "none") == {"stop.patience": None}
    assert flags("--name", "none") == {"name": "none"}


def test_a_text_that_looks_like_a_number_stays_a_text() -> None:
    assert validate(merge([MINIMAL, nested(flags("--name", "007"))])).name == "007"


def test_lists_are_repeated_or_written_in_brackets() -> None:
    assert flags("--report-to", "wandb", "--report-to", "mlflow") == {"report_to": ["wandb", "mlflow"]}
    assert flags("--report-to", "[wandb, mlflow]") == {"report_to": ["wandb", "mlflow"]}
    assert flags("--sampling.stop", "a, b") == {"sampling.stop": ["a, b"]}


def test_a_free_mapping_takes_yaml_and_dotted_entries() -> None:
    assert flags("--policy.model_init_kwargs", "{a: 1}") == {"policy.model_init_kwargs": {"a": 1}}
    assert flags("--sampling.generation_kwargs.length_penalty", "1e-1") == {
        "sampling.generation_kwargs.length_penalty": 0.1
    }


def test_an_adapter_starts_with_one_of_its_fields() -> None:
    config = validate(merge([MINIMAL, nested(flags("--policy.adapter.r", "4"))]))
    assert config.policy.adapter is not None  # type: ignore[union-attr]
    assert config.policy.adapter.r == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("token", "meant"),
    [
        ("--training.learing_rate", "--training.learning_rate"),
        ("--learning-rate", "--training.learning_rate"),
        ("--fron", "--from"),
        ("--jsn", "--json"),
        ("--num-round", "--num_rounds"),
        ("--policy.modl", "--policy.model"),
        ("--sampling.tempreature", "--sampling.temperature"),
    ],
)
def test_a_slip_is_reported_with_the_flag_that_was_meant(token: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"{token} is not a flag of `raftune train`; did you mean {meant}\?"):
        flags(token, "1")


def test_a_section_is_no_flag() -> None:
    with pytest.raises(ConfigError, match=r"it is a section: write --training\.learning_rate, for example"):
        flags("--training", "1")


def test_a_section_that_may_be_left_out_is_left_out_by_null() -> None:
    assert flags("--policy.adapter", "null") == {"policy.adapter": None}
    assert flags("--policy.adapter=none") == {"policy.adapter": None}
    told = {"policy": {"adapter": {"r": 8}}}
    assert merge([told, nested({"policy.adapter": None})]) == {"policy": {"adapter": None}}
    assert nested({"policy.adapter": None, "policy.adapter.r": 4}) == {"policy": {"adapter": {"r": 4}}}
    with pytest.raises(ConfigError, match=r"--policy.adapter takes no value but null; it is a section: write --policy"):
        flags("--policy.adapter", "8")


def test_what_is_inside_a_list_is_written_as_the_list() -> None:
    with pytest.raises(ConfigError, match=r"is a list: write --rewards.reward_funcs '\[\{weight: …\}\]'"):
        flags("--rewards.reward_funcs.weight", "1")
    given = flags("--rewards.reward_funcs", "[{spec: length, weight: 2}, starter]")
    assert given == {"rewards.reward_funcs": [{"spec": "length", "weight": 2}, "starter"]}


def test_every_field_is_a_flag() -> None:
    names = {*dict(fields_of(RunConfig))}
    assert len(names) > 90
    for name in names:
        assert name in flags(f"--{name}", "1")


def test_nothing_like_it_points_to_the_schema() -> None:
    with pytest.raises(ConfigError, match="`raftune schema` lists all fields"):
        flags("--zzzzzz", "1")


@pytest.mark.parametrize("tokens", [("--seed",), ("--seed", "--name", "x")])
def test_a_flag_without_its_value_is_refused(tokens: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--seed needs a value; got none"):
        flags(*tokens)
