"""A forecast is held to what the run then does, and to arithmetic."""

from __future__ import annotations

import functools
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from raftune.cli.commands.plan import lines
from raftune.config.load import merge, validate
from raftune.config.run import RunConfig
from raftune.errors import DataError, StoreError
from raftune.planning import Forecast, forecast
from raftune.planning.forecast import amounts
from raftune.planning.probe import through
from raftune.policies.causal_lm import loading
from raftune.policies.causal_lm.footprint import ModelFootprint
from raftune.policies.footprint import MeasuredPeak
from raftune.rewards.builtin.length import LengthReward
from raftune.runtime.run import run
from raftune.training import fit as training
from tests.builders import save_tiny, tiny_model, tiny_tokenizer
from tests.runs import tiny

BASE: dict[str, Any] = {"data": {"prompts": "p"}, "policy": {"model": "m"}}


def config(**changes: Any) -> RunConfig:
    return validate(merge([BASE, changes]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("planning")
    save_tiny(base / "model", bos=True)
    (base / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {n}"}) for n in range(30)))
    return base


def planned(
    folder: Path,
    measured: bool = False,
    seconds: float = 60.0,
    tell: Callable[[str], None] = lambda words: None,
    **changes: Any,
) -> Forecast:
    base = {
        "output_dir": str(folder / "run"),
        "num_rounds": 1,
        "prompts_per_round": 4,
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "policy": {"model": str(folder / "model")},
        "sampling": {"num_generations": 4, "max_completion_length": 8},
        "rewards": {"reward_funcs": [{"spec": "length", "options": {"target": 3}}]},
        "evaluation": {"num_prompts": 2, "num_generations": 2},
        "engine": {"threads": 1},
    }
    return forecast(validate(merge([base, changes])), measured=measured, seconds=seconds, tell=tell)


# -- amounts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "kept", "exact"),
    [
        ({"rule": "best_of_k"}, 10, True),
        ({"rule": "best_of_k", "drop_duplicates": True}, 10, True),
        ({"rule": "best_of_k", "margin": 0.1}, 10, False),
        ({"rule": "top_m", "m": 3}, 30, True),
        ({"rule": "top_m", "m": 99}, 80, True),
        ({"rule": "random", "m": 2}, 20, True),
        ({"rule": "top_fraction", "keep_fraction": 0.125}, 10, True),
        ({"rule": "threshold", "threshold": 0.0}, 80, False),
        ({"rule": "threshold", "threshold": 0.0, "max_per_prompt": 2}, 20, False),
        ({"rule": "softmax", "temperature": 1.0}, 80, False),
    ],
)
def test_kept_rows_follow_from_the_rule(selection: dict[str, Any], kept: int, exact: bool) -> None:
    found = amounts(config(prompts_per_round=10, selection=selection | {"all_equal": "keep"}), train=100, held_out=5)
    assert found.kept == kept
    assert found.kept_exact is (exact and "drop_duplicates" not in selection)
    ranks = selection["rule"] not in ("threshold", "top_fraction")
    assert amounts(config(prompts_per_round=10, selection=selection), train=100, held_out=5).kept_exact is (
        found.kept_exact and not ranks
    )


def test_samples_are_those_of_every_round_and_of_every_judgement() -> None:
    changes = {"num_rounds": 3, "prompts_per_round": 10, "sampling": {"num_generations": 4}}
    found = amounts(config(**changes, evaluation={"num_generations": 2}), train=100, held_out=5)
    assert found.samples == 3 * 40 + 4 * 10


def test_a_small_data_set_bounds_the_round() -> None:
    assert amounts(config(prompts_per_round=64), train=7, held_out=0).prompts == 7


def test_other_sources_compete_but_are_not_generated() -> None:
    sampling = {"num_generations": 4, "candidate_columns": ["human"], "teacher": {"model": "t", "num_generations": 2}}
    found = amounts(config(prompts_per_round=10, sampling=sampling), train=100, held_out=0)
    assert (found.generated, found.competing) == (40, 70)


def test_steps_count_epochs_accumulation_and_replay() -> None:
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2.0}

    def steps(**changes: Any) -> int:
        return amounts(config(prompts_per_round=64, training=training | changes), train=100, held_out=0).steps

    assert steps() == 16
    assert steps(replay_rounds=1) == 32
    assert steps(max_steps=5) == 5


# -- sizes ------------------------------------------------------------------------------------------------------------

MODEL = ModelFootprint("Llama", 1000, 1000, "float32", 4, 64, 4, 100, 128, "cpu")


def test_memory_is_weights_and_cache_or_weights_gradients_and_moments() -> None:
    found = MODEL.memory(config(sampling={"max_completion_length": 20, "batch_size": 8}), longest_prompt=10, rows=512)
    assert found.drawing == 4000 + 8 * 30 * 64
    assert found.training == 4000 + 3 * 4000


def test_the_context_bounds_the_cache() -> None:
    found = MODEL.memory(config(sampling={"max_completion_length": 500, "batch_size": 1}), longest_prompt=10, rows=9)
    assert found.cache == 128 * 64


def test_kept_models_are_counted() -> None:
    planned_ = amounts(config(num_rounds=10), train=100, held_out=0)
    assert MODEL.disk(config(num_rounds=10), planned_).models == 10 * 4000
    assert MODEL.disk(config(num_rounds=10, keep_models="best"), planned_).models == 3 * 4000


def test_an_adapter_over_bfloat16_weights_is_float32() -> None:
    model = ModelFootprint("Llama", 1000, 100, "bfloat16", 2, 64, 4, 100, 128, "cpu")
    planned_ = amounts(config(num_rounds=10), train=100, held_out=0)
    assert model.disk(config(num_rounds=10), planned_).models == 10 * 400
    assert model.memory(config(), longest_prompt=10, rows=1).training == 2000 + 3 * 400


def test_weights_in_four_bits_take_what_the_loaded_model_takes(folder: Path) -> None:
    changes = {"adapter": {"r": 2}, "load_in_4bit": True}
    model = planned(folder, policy={"model": str(folder / "model"), **changes}).model
    assert isinstance(model, ModelFootprint) and model.parameters > model.in_four_bits > 0
    config = validate({"data": {"prompts": "p"}, "policy": {"model": str(folder / "model"), **changes}})
    weights = loading.load_weights(config.policy, config.policy.model, None, torch.device("cpu"))
    actual = sum(weight.nbytes for weight in weights.parameters())
    assert actual <= model.held <= 1.03 * actual


def test_checkpoints_are_counted_where_a_fit_takes_longer_than_a_minute_or_is_asked_for_them() -> None:
    planned_ = amounts(config(prompts_per_round=100, training={"per_device_train_batch_size": 1}), 1000, 0)
    assert MODEL.disk(config(), planned_, fit=59.0).checkpoints == 0
    assert MODEL.disk(config(), planned_, fit=61.0).checkpoints == 2 * 3 * 4000
    assert MODEL.disk(config(training={"save_steps": 10}), planned_, fit=1.0).checkpoints == 2 * 3 * 4000


def test_a_line_through_two_measurements_is_never_negative() -> None:
    line = through(10, 3.0, 20, 5.0)
    assert (line.fixed, line.each) == (1.0, 0.2)
    assert line.of(100, 2) == 22.0
    for noisy in (through(10, 3.0, 20, 2.0), through(10, 0.1, 20, 5.0)):
        assert noisy.fixed >= 0
        assert noisy.each >= 0


# -- the whole --------------------------------------------------------------------------------------------------------


def test_the_forecast_is_what_the_run_does(folder: Path) -> None:
    found = planned(folder)
    assert isinstance(found.model, ModelFootprint)
    assert found.model.parameters == sum(w.numel() for w in tiny_model("llama").parameters())
    assert found.model.cached_token == 2 * 2 * 2 * 8 * 4  # keys and values, two layers, two heads of width 8, float32
    assert (found.prompts.train, found.prompts.held_out) == (28, 2)
    settings = {"output_dir": str(folder / "held"), "num_rounds": 1, "prompts_per_round": 4}
    settings |= {"data": {"prompts": str(folder / "prompts.jsonl")}, "policy": {"model": str(folder / "model")}}
    settings |= {"sampling": {"num_generations": 4, "max_completion_length": 8}, "engine": {"threads": 1}}
    settings |= {"rewards": {"reward_funcs": [{"spec": "length", "options": {"target": 3}}]}}
    settings |= {"evaluation": {"num_prompts": 2, "num_generations": 2}}
    run(settings)
    summary = json.loads((folder / "held/round-0001/select/summary.json").read_text())
    report = json.loads((folder / "held/round-0001/model/training.json").read_text())
    assert (found.amounts.generated, found.amounts.kept) == (summary["samples"], summary["prompts"])
    assert not found.amounts.kept_exact and summary["kept"] == summary["prompts"] - summary["nothing_to_rank"]
    assert found.amounts.steps == report["steps"]


def test_nothing_is_written_where_the_run_will_be(folder: Path) -> None:
    planned(folder)
    assert not (folder / "run").exists()


def test_a_probe_times_every_kind_of_work(folder: Path) -> None:
    found = planned(folder, measured=True)
    assert found.seconds is not None
    assert found.probe is not None
    assert all(found.seconds[name] > 0 for name in ("generating", "scoring", "log-probabilities", "training"))
    assert 0 < found.probe.tokens <= 8
    assert found.probe.generation.startswith("shared prefix")


@pytest.mark.slow
def test_a_probe_of_little_time_tries_less_and_says_what_it_extrapolated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that needs 20 ms a token, and a reward of 0.2 s a sample: in full this would take more than a minute."""
    forward, score = LlamaForCausalLM.forward, LengthReward.__call__

    @functools.wraps(forward)
    def sleepy(*args: Any, **rest: Any) -> Any:
        time.sleep(0.02)
        return forward(*args, **rest)

    monkeypatch.setattr(LlamaForCausalLM, "forward", sleepy)

    def slow(self: Any, *, completions: list[Any], **rest: Any) -> Any:
        time.sleep(0.2 * len(completions))
        return score(self, completions=completions, **rest)

    monkeypatch.setattr(LengthReward, "__call__", slow)
    told: list[str] = []
    sampling = {"num_generations": 16, "max_completion_length": 100, "backend": "hf_generate"}
    began = time.monotonic()
    found = planned(folder, measured=True, seconds=6.0, tell=told.append, sampling=sampling)
    assert time.monotonic() - began < 12
    assert found.probe is not None and found.seconds is not None
    assert any(
        re.fullmatch(r"completions were generated to \d+ of 100 tokens", words) for words in found.probe.cut_short
    )
    assert any(words.endswith("samples were scored") for words in found.probe.cut_short)
    assert found.probe.tokens > 30, "what was cut off by the probe counts as if it had been generated to the end"
    assert [words.split(":")[0] for words in told][-1] == "probe" and len(told) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slow", "missing"),
    [
        ((loading, "load_weights"), ("generating", "scoring", "log-probabilities", "training")),
        ((LlamaForCausalLM, "forward"), ("generating", "scoring", "log-probabilities", "training")),
        ((LengthReward, "__call__"), ("scoring", "log-probabilities", "training")),
        ((training, "fit"), ("training",)),
    ],
    ids=["reading", "generating", "scoring", "training"],
)
def test_a_probe_is_ended_wherever_it_is_when_its_time_is_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slow: tuple[Any, str], missing: tuple[str, ...]
) -> None:
    planned(folder)  # what is imported for the first time is no part of this
    whose, name = slow
    usual = getattr(whose, name)

    @functools.wraps(usual)
    def endless(*args: Any, **rest: Any) -> Any:
        time.sleep(60)
        return usual(*args, **rest)

    monkeypatch.setattr(whose, name, endless)
    began = time.monotonic()
    found = planned(folder, measured=True, seconds=2.0)
    assert time.monotonic() - began < 6
    assert found.probe is not None and found.seconds is not None and isinstance(found.model, ModelFootprint)
    assert found.probe.missing == missing
    assert not found.seconds.keys() & set(missing)
    assert found.model.parameters == sum(w.numel() for w in tiny_model("llama").parameters())
    assert (found.probe.load is None) == (name in ("load_weights", "forward"))
    unread = [note for note in found.notes if "could not be read within 2 seconds" in note]
    assert len(unread) == (name == "load_weights")
    said = dict(lines(config(num_rounds=1), found))["time"]
    assert all(words in said for words in missing) and "--probe-seconds" in said
    assert signal.getitimer(signal.ITIMER_REAL)[1] == 0, "no alarm of the probe is left"


def test_the_memory_of_the_probe_is_measured_and_scaled_to_the_run(folder: Path) -> None:
    found = planned(folder, measured=True)
    assert found.peaks is not None
    assert found.peaks.drawing is not None and found.peaks.training is not None
    assert found.peaks.run_drawing is not None and found.peaks.run_drawing >= found.peaks.drawing > 100e6
    drawing, training = MeasuredPeak(3_000, 1_000, 4, 10.0), MeasuredPeak(20_000, 1_000, 2, 10.0)
    config_ = config(sampling={"max_completion_length": 30, "batch_size": 8})
    scaled = MODEL.peaks(drawing, training, config_, prompt=10, rows=512)
    assert scaled.run_drawing == 3_000 + (8 * 40 - 4 * 20) * 64 + 4 * 100 * 16
    batch = config_.training.per_device_train_batch_size
    assert scaled.run_tuning == 20_000 + int((20_000 - 1_000 - 4_000 - 12_000) * (batch * 40 / (2 * 20) - 1))


@pytest.mark.parametrize("root", ["/proc/x", "/proc/self/y/z"])
def test_a_directory_that_cannot_be_written_is_refused_when_planned_and_before_a_run_starts(
    folder: Path, root: str
) -> None:
    with pytest.raises(StoreError, match="output_dir must be in a folder that can be written"):
        planned(folder, output_dir=root)
    with pytest.raises(StoreError, match="output_dir must be in a folder that can be written"):
        run(tiny.config(Path(root)), tiny.objects())


def test_completions_in_the_data_that_cannot_be_used_are_refused_when_planned(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "human": "yes" if n != 7 else None} for n in range(12)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"data": {"prompts": str(tmp_path / "p.jsonl")}, "evaluation": {"num_prompts": 0}}
    with pytest.raises(DataError, match=r"sampling\.candidate_columns, 'human' of prompt"):
        planned(folder, sampling={"candidate_columns": ["human"]}, **data)
    with pytest.raises(DataError, match=r"candidate_columns names 'teacher', which the prompts lack; they have prompt"):
        planned(folder, sampling={"candidate_columns": ["teacher"]}, **data)
    reference = {"path": str(tmp_path / "p.jsonl"), "completion_column": "human"}
    with pytest.raises(DataError, match=r"training\.reference\.path, row 8"):
        planned(folder, training={"reference": reference}, **data)


def test_a_missing_column_of_candidates_is_refused_before_generation(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sampling": {"candidate_columns": ["teacher"]}}
    with pytest.raises(DataError, match="candidate_columns names 'teacher', which the prompts lack"):
        run(tiny.config(tmp_path / "run", **changes), tiny.objects())
    assert not (tmp_path / "run" / "round-0000" / "model").exists()


def test_a_file_in_the_way_is_refused_when_planned(folder: Path) -> None:
    with pytest.raises(StoreError, match="is a file"):
        planned(folder, output_dir=str(folder / "prompts.jsonl" / "run"))


def test_only_the_adapters_weights_count_as_trained(folder: Path) -> None:
    found = planned(folder, policy={"adapter": {"r": 2, "target_modules": ["q_proj"]}})
    assert isinstance(found.model, ModelFootprint)
    assert found.model.trained == 2 * (32 * 2 + 2 * 32)  # two layers, A and B of rank 2


def test_prompts_that_do_not_fit_are_counted_and_named(folder: Path) -> None:
    path = folder / "long.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in ["ok", "x" * 300, "y" * 300]))
    with pytest.raises(DataError, match=r"2 of 3 prompts cannot be used .*the limit is 127"):
        planned(folder, data={"prompts": str(path)})


def test_notes_say_what_was_perhaps_not_meant(folder: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer(pad=False).save_pretrained(tmp_path / "model")
    changes: dict[str, Any] = {"policy": {"model": str(tmp_path / "model")}}
    changes |= {"sampling": {"temperature": 0.7, "max_completion_length": 400}, "prompts_per_round": 64}
    notes = " | ".join(planned(folder, **changes).notes)
    for words in ("no pad token", "temperature is below 1", "such completions end there", "there are 28 prompts"):
        assert words in notes


def test_a_fallback_to_generate_is_reported_with_its_reason(folder: Path) -> None:
    found = planned(folder, measured=True, sampling={"generation_kwargs": {"num_beams": 4}})
    assert any("generated through `generate`" in note for note in found.notes)
    assert found.probe is not None
    assert found.probe.generation.startswith("`generate`") and "num_beams" in found.probe.generation


def test_rewards_that_cannot_rank_are_recorded(folder: Path) -> None:
    reward = {"spec": "length", "options": {"min": 0}}
    found = planned(folder, measured=True, rewards={"reward_funcs": [reward]})
    assert any("all tried samples scored 0" in note for note in found.notes)


def test_what_a_round_of_such_samples_would_raise_an_alarm_for_is_reported(folder: Path) -> None:
    cut = {"sampling": {"max_completion_length": 1}}
    notes = [note for note in planned(folder, measured=True, **cut).notes if "raises an alarm" in note]
    assert any("cut off" in note for note in notes), notes
    quiet = planned(folder, measured=True, guards={"enabled": False}, **cut).notes
    assert not any("raises an alarm" in note for note in quiet)


def test_completions_that_are_all_cut_off_are_recorded_where_such_are_not_learned_from(folder: Path) -> None:
    cut = {"sampling": {"num_generations": 1, "max_completion_length": 1}, "selection": {"rule": "random"}}
    found = planned(folder, measured=True, training={"mask_truncated_completions": True}, **cut)
    assert any("tried samples were cut off at max_completion_length" in note for note in found.notes)


def test_a_run_of_no_rounds_is_planned_by_its_held_out_prompts(folder: Path) -> None:
    prompts = {"data": {"prompts": None}, "evaluation": {"prompts": str(folder / "prompts.jsonl"), "num_prompts": 5}}
    found = planned(folder, measured=True, num_rounds=0, **prompts)
    assert (found.prompts.train, found.prompts.held_out, found.amounts.samples) == (0, 5, 10)
    assert found.seconds is not None and found.seconds["training"] == 0
    assert found.notes == ()
