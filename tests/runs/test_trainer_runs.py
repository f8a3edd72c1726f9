"""RaftTrainer over whole tiny runs: TRL's call, exact continuation, models that plain transformers and peft load."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from raftune.errors import ConfigChanged, ConfigError, DataError, StoreError
from raftune.store.parquet import read_table
from raftune.trainer import RaftConfig, RaftTrainer
from raftune.trainer.models import model_hash, tokenizer_hash
from tests.builders import save_tiny, tiny_llama, tiny_model, tiny_tokenizer

torch.set_num_threads(1)

ROWS = [{"prompt": f"say {number}", "wanted": number % 7} for number in range(20)]
SMALL = {"num_rounds": 2, "prompts_per_round": 4, "num_generations": 3, "max_completion_length": 5}
HELD_OUT = {"num_eval_prompts": 2, "num_generations_eval": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
HERE = {"use_cpu": True, "disable_tqdm": True, "run_config": {"engine.threads": 1}}


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def nearness(completions: list[str], wanted: list[int], **columns: Any) -> list[float]:
    return [-abs(len(text) - target) for text, target in zip(completions, wanted, strict=True)]


def trainer(folder: Path, rewards: Any = length, **changes: Any) -> RaftTrainer:
    """A tiny trainer; what is no argument of RaftTrainer goes to RaftConfig."""
    names = ("model", "train_dataset", "eval_dataset", "processing_class", "peft_config", "callbacks")
    names += ("reward_processing_classes",)
    given = {name: changes.pop(name) for name in names if name in changes}
    args = RaftConfig(**{"output_dir": str(folder), **SMALL, **HELD_OUT, **HERE, **changes})
    defaults = {"model": tiny_llama(), "train_dataset": ROWS, "processing_class": tiny_tokenizer()}
    return RaftTrainer(reward_funcs=rewards, args=args, **{**defaults, **given})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RaftTrainer:
    """A run that others look at and do not touch."""
    found = trainer(tmp_path_factory.mktemp("trained") / "run", [nearness, length], reward_weights=[1.0, 0.1])
    found.train()
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


def samples(run: Path) -> list[Any]:
    """What was generated, decided and learned in every round, and the weights that came of it."""
    found: list[Any] = []
    for path in sorted(run.glob("round-*/generate/chunk-*.parquet")):
        found.append(read_table(path).select(["sample_id", "seed", "completion", "completion_ids"]).to_pylist())
    for path in sorted(run.glob("round-*/select/verdicts.parquet")):
        found.append(read_table(path).to_pylist())
    return [*found, *(path.read_bytes() for path in sorted(run.glob("round-000[1-9]/model/*.safetensors")))]


# -- the call, and what comes of it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "qwen2"])
def test_an_adapter_is_trained_and_loaded_back_by_plain_peft(arch: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear")
    found = trainer(tmp_path / "run", model=tiny_model(arch), peft_config=lora, num_eval_prompts=0)  # the last round
    found.train()
    found.save_model(tmp_path / "saved")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(found.model, PeftModel)
    assert torch.equal(logits(loaded.eval()), logits(found.model))
    assert not torch.equal(logits(found.model), logits(tiny_model(arch)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("abc the")["input_ids"] == tiny_tokenizer()("abc the")["input_ids"]
    assert (tmp_path / "saved" / "README.md").is_file()


def test_full_weights_are_loaded_back_by_plain_transformers_also_beside_the_run(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run")
    found.train()
    found.save_model(found.args.output_dir)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert torch.equal(logits(loaded), logits(found.model))
    assert found.train().metrics["best_round"] == json.loads((tmp_path / "run" / "best.json").read_text())["round"]


@pytest.mark.slow
def test_a_learnable_reward_goes_up(tmp_path: Path) -> None:
    """Untrained, an answer of 8 tokens holds 8/261 an "e" on average; all 128 evaluation samples then hold 4 in sum.

    The test asks for 128 in sum. Under no learning that sum is at most Poisson with mean 8, and 128 of it has a
    probability below 1e-90.
    """

    def many_e(completions: list[str], **columns: Any) -> list[float]:
        return [float(text.count("e")) for text in completions]

    sizes = {"num_rounds": 5, "prompts_per_round": 16, "num_generations": 32, "max_completion_length": 8}
    held_out = {"num_eval_prompts": 8, "num_generations_eval": 16, "eval_dataset": ROWS[:8], "train_dataset": ROWS[4:]}
    found = trainer(tmp_path / "run", many_e, **{**sizes, **held_out}, learning_rate=1e-2, num_train_epochs=3)
    found.train()
    rewards = [entry["eval_reward"] for entry in found.state.log_history if "eval_reward" in entry]
    assert rewards[0] < 0.5
    assert max(rewards) >= 1.0
    assert found.evaluate()["eval_reward"] == max(rewards)


def test_the_object_that_was_given_is_not_changed(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama().train(), tiny_tokenizer(pad=False)
    before = (model_hash(model), tokenizer_hash(tokenizer), model.training, tokenizer.pad_token)
    given = {"model": model, "processing_class": tokenizer, "num_rounds": 1, "num_eval_prompts": 0}
    found = trainer(tmp_path / "run", **given)
    assert found.model is model
    found.train()
    assert (model_hash(model), tokenizer_hash(tokenizer), model.training, tokenizer.pad_token) == before
    assert model_hash(found.model) != before[0]


@pytest.mark.slow
def test_a_model_by_name_and_the_same_as_an_object_give_the_same_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    by_name = trainer(tmp_path / "a", model=str(folder), processing_class=None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    as_object = trainer(tmp_path / "b", model=model, processing_class=tokenizer)
    for one in (by_name, as_object):
        one.train()
    assert len(samples(tmp_path / "a")) == 6
    assert samples(tmp_path / "a") == samples(tmp_path / "b")


def test_a_tokenizer_beside_a_named_model_is_the_one_that_is_used_and_published(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    chat = [{"prompt": [{"role": "user", "content": f"say {number}"}]} for number in range(12)]

    def spoken(completions: list[Any], **columns: Any) -> list[float]:
        return [float(len(messages[0]["content"])) for messages in completions]

    given = {"model": str(folder), "train_dataset": Dataset.from_list(chat), "num_rounds": 1}
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        trainer(tmp_path / "without", spoken, **given, processing_class=None).train()
    lora = LoraConfig(r=2, target_modules="all-linear")
    found = trainer(tmp_path / "with", spoken, **given, processing_class=tiny_tokenizer(chat=True), peft_config=lora)
    found.train()
    found.save_model(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == tiny_tokenizer(chat=True).chat_template


def test_async_rewards_and_rewards_that_do_not_apply_are_taken(tmp_path: Path) -> None:
    async def slow(completions: list[str], **columns: Any) -> list[float]:
        return [2.0 for _ in completions]

    def some(prompts: list[str], **columns: Any) -> list[float | None]:
        return [None if prompt.endswith("1") else 1.0 for prompt in prompts]

    found = trainer(tmp_path / "run", [slow, some, lambda completions, **_: [None] * len(completions)], num_rounds=1)
    found.train()
    entry = next(entry for entry in found.state.log_history if "reward" in entry)
    assert entry["rewards/slow/mean"] == 2.0
    assert entry["rewards/some/mean"] == 1.0
    assert 2.0 <= entry["reward"] <= 3.0
    assert "rewards/reward_2/mean" not in entry


def test_a_reward_model_by_name_or_as_an_object_gives_the_same_scores(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "judge")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    histories = []
    for name, reward, tokenizer in (("a", str(folder), None), ("b", loaded, AutoTokenizer.from_pretrained(folder))):
        found = trainer(tmp_path / name, reward, reward_processing_classes=tokenizer, num_rounds=1)
        found.train()
        histories.append([entry["rewards/judge/mean"] for entry in found.state.log_history if "reward" in entry])
    assert histories[0] == histories[1] != []


def save_reward_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# -- what is told ----------------------------------------------------------------------------------------------------


def test_the_history_has_the_names_of_trl(trained: RaftTrainer) -> None:
    rounds = [entry for entry in trained.state.log_history if "reward" in entry]
    assert [entry["epoch"] for entry in rounds] == [1.0, 2.0]
    for name in (
        *("reward", "reward_std", "rewards/nearness/mean", "rewards/nearness/std", "rewards/length/mean"),
        *("completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std", "num_tokens", "step_time"),
    ):
        assert isinstance(rounds[0][name], float), name
    evaluations = [entry for entry in trained.state.log_history if "eval_reward" in entry]
    assert [(entry["epoch"], entry["step"]) for entry in evaluations] == [(0.0, 0), (1.0, 2), (2.0, 4)]
    assert evaluations[0]["eval_kl"] == 0.0
    assert trained.state.global_step == 4


def test_the_metrics_of_a_round_are_those_of_its_samples(trained: RaftTrainer) -> None:
    entry = next(entry for entry in trained.state.log_history if "reward" in entry)
    folder = Path(trained.args.output_dir) / "round-0001"
    scores = read_table(folder / "score" / "chunk-00000.parquet").column("score").to_numpy()
    rows = read_table(folder / "generate" / "chunk-00000.parquet").to_pylist()
    lengths = [len(row["completion_ids"]) for row in rows]
    assert entry["reward"] == pytest.approx(scores.mean())
    assert entry["reward_std"] == pytest.approx(scores.std())
    assert entry["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    prompts = read_table(folder / "plan" / "prompts.parquet").to_pylist()
    encoded = {row["prompt_id"]: len(tiny_tokenizer()(row["prompt"])["input_ids"]) for row in prompts}
    assert entry["num_tokens"] == sum(lengths) + sum(encoded[row["prompt_id"]] for row in rows)


def test_beta_puts_the_divergence_of_the_samples_into_the_history(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run", beta=0.1)
    found.train()
    first, second = (entry["kl"] for entry in found.state.log_history if "reward" in entry)
    assert first == 0.0
    assert second != 0.0


def test_the_loss_is_logged_every_so_many_steps(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run", logging_steps=3, logging_first_step=True, num_train_epochs=2)
    found.train()
    losses = [(entry["step"], entry["loss"]) for entry in found.state.log_history if "loss" in entry]
    assert [step for step, _ in losses] == [1, 3, 6]
    report = json.loads((tmp_path / "run" / "round-0001" / "model" / "training.json").read_text())["losses"]
    assert losses[1][1] == pytest.approx((report[1] + report[2]) / 2)


class Recorder(TrainerCallback):
    """Writes down what it is told; asks to stop after `stop_after` epochs."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.told: list[str] = []
        self.stop_after = stop_after

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append("train begins")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(f"round {int(state.epoch) + 1} begins")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(f"step {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.told.append("log " + ("eval" if "eval_reward" in logs else "reward" if "reward" in logs else "loss"))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.told.append("evaluated")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(f"round {int(state.epoch)} ends")
        if self.stop_after is not None and state.epoch >= self.stop_after:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append("train ends")


def test_callbacks_see_rounds_as_epochs(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer(tmp_path / "run", callbacks=[recorder], num_rounds=1).train()
    start = ["train begins", "log eval", "evaluated"]
    steps = ["round 1 begins", "step 1", "step 2", "log reward", "log eval", "evaluated", "round 1 ends"]
    assert recorder.told == [*start, *steps, "log loss", "train ends"]


def test_many_passes_over_few_rows_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "raftune"):
        trainer(tmp_path / "a", num_rounds=1, max_steps=20, num_eval_prompts=0).train()  # four rows are two steps
    assert "20 optimizer steps" not in caplog.text
    with caplog.at_level(logging.WARNING, "raftune"):
        trainer(tmp_path / "b", num_rounds=1, max_steps=24, num_eval_prompts=0).train()
    assert "24 optimizer steps went 12 times over the round's 4 rows: max_steps = 24 is meant" in caplog.text


def test_early_stopping_of_transformers_stops_a_run(tmp_path: Path) -> None:
    stops = [EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e6)]
    given = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "eval_strategy": "epoch"}
    found = trainer(tmp_path / "run", callbacks=stops, num_rounds=4, **given)
    assert "a callback stopped the training after round 1" in found.train().metrics["stopped_because"]


def test_what_was_kept_is_shown_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path / "run", num_rounds=1, log_completions=True, num_completions_to_print=2).train()
    shown = capsys.readouterr()
    assert "kept in round 1" in shown.err
    assert shown.err.count("say ") == 2
    assert not any(ord(char) < 32 and char != "\n" for char in shown.err)
    assert shown.out == ""


def test_progress_is_shown_beside_the_results_unless_it_is_turned_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "a", num_rounds=1, disable_tqdm=False).train()
    shown = capsys.readouterr()
    assert "best of 2" in shown.err
    assert shown.out == ""
    trainer(tmp_path / "b", num_rounds=1).train()
    assert capsys.readouterr().err == ""


def test_a_tokenizer_without_a_pad_token_is_handled_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "raftune"):
        trainer(tmp_path / "run", processing_class=tiny_tokenizer(pad=False), num_rounds=1).train()
    assert "no pad token: EOS" in caplog.text


# -- the same call again ---------------------------------------------------------------------------------------------


def test_the_same_call_finds_the_run_finished_and_tells_the_same_history(
    trained: RaftTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    again = trainer(Path(trained.args.output_dir), [nearness, length], reward_weights=[1.0, 0.1], callbacks=[recorder])
    with caplog.at_level(logging.WARNING, "raftune"):
        outcome = again.train(resume_from_checkpoint=True)
    assert "is finished: all 2 rounds are done. Nothing had to be done." in caplog.text
    assert recorder.told == ["train begins", "train ends"]
    assert again.state.log_history == trained.state.log_history
    assert outcome.global_step == 4
    assert outcome.metrics["best_round"] in (0, 1, 2)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_what_an_unstopped_one_gives(tmp_path: Path) -> None:
    stopped = trainer(tmp_path / "a", callbacks=[Recorder(stop_after=1)])
    assert "after round 1; train() goes on from there" in stopped.train().metrics["stopped_because"]
    assert not (tmp_path / "a" / "round-0002").exists()
    rest = Recorder()
    trainer(tmp_path / "a", callbacks=[rest]).train()
    assert "round 1 begins" not in rest.told
    assert "round 2 begins" in rest.told
    trainer(tmp_path / "b").train()
    assert samples(tmp_path / "a") == samples(tmp_path / "b")


@pytest.mark.slow
def test_an_interrupted_cell_goes_on_to_what_an_uninterrupted_one_gives(tmp_path: Path) -> None:
    stop = str(tmp_path / "stop")
    Path(stop).touch()

    def interrupted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if len(prompts) == 12 and Path(stop).exists():  # a round's samples, and not those of an evaluation
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return length(completions)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "a", interrupted).train()
    assert not (tmp_path / "a" / "round-0001" / "model").exists()
    Path(stop).unlink()
    for folder in ("a", "b"):
        trainer(tmp_path / folder, interrupted).train()
    assert samples(tmp_path / "a") == samples(tmp_path / "b")


def test_more_rounds_go_on(tmp_path: Path) -> None:
    trainer(tmp_path / "run", num_rounds=1).train()
    found = trainer(tmp_path / "run", num_rounds=2)
    found.train()
    assert [entry["epoch"] for entry in found.state.log_history if "reward" in entry] == [1.0, 2.0]


CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "an option": (lambda: {"temperature": 0.5}, "temperature: 1.0 → 0.5"),
    "the model": (lambda: {"model": tiny_llama(seed=1)}, "model: object:"),
    "the tokenizer": (lambda: {"processing_class": tiny_tokenizer(bos=True)}, "processing_class: object:"),
    "the data": (lambda: {"train_dataset": ROWS[1:]}, "train_dataset: object:"),
    "the reward": (lambda: {"rewards": nearness}, "the rewards have changed"),
    "the adapter": (lambda: {"peft_config": LoraConfig(r=2)}, "peft_config: None → "),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_call_in_the_same_directory_is_refused_with_the_difference(
    what: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed" / "run"
    trainer(folder, num_rounds=1).train()
    changes, message = CHANGES[what]
    with pytest.raises(ConfigChanged) as found:
        trainer(folder, num_rounds=1, **changes()).train()
    assert message in str(found.value)
    assert "call train(redo='" in str(found.value)


def test_what_changed_is_done_again_on_request(tmp_path: Path) -> None:
    trainer(tmp_path / "run", num_rounds=1).train()
    found = trainer(tmp_path / "run", num_rounds=1, selection={"rule": "top_m", "m": 2, "all_equal": "keep"})
    found.train(redo="1/select")
    summary = json.loads((tmp_path / "run" / "round-0001" / "select" / "summary.json").read_text())
    assert summary["kept"] == 8


def test_a_checkpoint_to_start_from_is_refused(trained: RaftTrainer) -> None:
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint must be left out; got 'checkpoint-3'"):
        trained.train(resume_from_checkpoint="checkpoint-3")


# -- what cannot be had yet ------------------------------------------------------------------------------------------


def test_before_a_round_is_done_there_is_nothing_to_save_or_evaluate(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run")
    for attempt in (found.evaluate, found.save_model, found.push_to_hub):
        with pytest.raises(StoreError, match=r"no round is done. Call train\(\) first"):
            attempt()


def test_without_held_out_prompts_the_last_round_is_the_model(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run", num_eval_prompts=0)
    assert found.train().metrics["best_round"] == 2
    with pytest.raises(ConfigError, match=r"evaluate\(\) needs held-out prompts; got none with num_eval_prompts=0"):
        found.evaluate()


def test_a_few_prompts_are_enough_to_train_on(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run", train_dataset=ROWS[:5], num_rounds=1)
    found.train()
    assert found.state.global_step == 2


def test_without_the_hub_a_push_says_so(trained: RaftTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="push_to_hub needs the hub, and HF_HUB_OFFLINE is set"):
        trained.push_to_hub()


def test_train_scores_the_failed_samples_alone_again(tmp_path: Path) -> None:
    def moody(completions: list[str], **columns: Any) -> list[float]:
        return [1.0 / (len(text) % 2) for text in completions]

    def mended(completions: list[str], **columns: Any) -> list[float]:
        return [100.0] * len(completions)

    mended.__name__ = moody.__name__
    folder = tmp_path / "run"
    small = {"num_rounds": 1, "num_eval_prompts": 0, "run_config": {**HERE["run_config"], "rewards.batch_size": 1}}
    trainer(folder, moody, **small).train()
    before = read_table(folder / "round-0001/score/chunk-00000.parquet").to_pylist()
    trainer(folder, mended, **small).train(redo="score", only="error")
    after = read_table(folder / "round-0001/score/chunk-00000.parquet").to_pylist()
    assert {row["status"] for row in before} == {"ok", "error"}
    for old, new in zip(before, after, strict=True):
        assert new["score"] == (100.0 if old["status"] == "error" else old["score"])
