"""What scripts do with a trainer around train(): evaluate on given data, save, report, resume, stream."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import TrainerCallback

from raftune.errors import ConfigError, RaftuneError
from raftune.store import interruption
from raftune.store.parquet import read_table
from raftune.trainer import RaftConfig, RaftTrainer
from raftune.trainer.interrupts import leaving_on_interrupt
from raftune.trainer.messages import in_python
from tests.builders import tiny_llama
from tests.runs.test_trainer_runs import ROWS, length, logits, samples, trainer
from tests.unit.trainer.test_trainer import warned

torch.set_num_threads(1)

LORA = LoraConfig(r=2, target_modules="all-linear")


def worse(completions: list[str], trainer_state: Any = None, **columns: Any) -> list[float]:
    """Falls with every call, so that no round is better than the start."""
    worse.calls = getattr(worse, "calls", 0) - 1  # type: ignore[attr-defined]
    return [float(worse.calls) + len(text) / 1000 for text in completions]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RaftTrainer:
    found = trainer(tmp_path_factory.mktemp("scripts") / "run", num_rounds=1, train_dataset=Dataset.from_list(ROWS))
    found.train()
    return found


@pytest.fixture(scope="module")
def unimproved(tmp_path_factory: pytest.TempPathFactory) -> tuple[RaftTrainer, list[str]]:
    """A run of an adapter whose best round is the start, and what train() warned of."""
    found = trainer(tmp_path_factory.mktemp("unimproved") / "run", worse, num_rounds=1, peft_config=LORA)
    with warned() as lines:
        found.train()
    return found, lines


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_of_the_data_that_is_given(trained: RaftTrainer) -> None:
    rows = ROWS[:3]
    found = trained.evaluate(Dataset.from_list(rows))
    assert found["eval_reward"] == found["eval_rewards/length/mean"] > 0
    assert found["eval_statuses/ok"] == 2 * len(rows)
    assert {"eval_completions/mean_length", "eval_runtime", "eval_samples_per_second", "epoch"} <= {*found}
    assert trained.evaluate(eval_dataset=rows)["eval_reward"] == found["eval_reward"]
    assert trained.state.log_history[-1]["eval_reward"] == found["eval_reward"]


def test_several_data_sets_are_evaluated_under_their_names(trained: RaftTrainer) -> None:
    found = trained.evaluate({"a": ROWS[:2], "b": ROWS[2:4]}, metric_key_prefix="test")
    assert {"test_a_reward", "test_b_reward"} <= {*found}
    assert trained.evaluate(ROWS[2:4], metric_key_prefix="test")["test_reward"] == found["test_b_reward"]


def test_rounds_are_judged_by_several_held_out_sets_together(tmp_path: Path) -> None:
    several = {"a": ROWS[:6], "b": Dataset.from_list(ROWS[6:12])}
    found = trainer(tmp_path / "run", eval_dataset=several, num_eval_prompts=5, num_rounds=1)
    found.train()
    judged = read_table(tmp_path / "run" / "round-0000" / "data" / "held_out.parquet").column("prompt").to_pylist()
    assert judged == [row["prompt"] for row in (*ROWS[:3], *ROWS[6:8])]
    assert {"eval_a_reward", "eval_b_reward"} <= {*found.evaluate()}


def test_a_data_set_that_is_put_in_place_is_evaluated(trained: RaftTrainer) -> None:
    stored = trained.evaluate()
    assert len(trained.train_dataset) == len(ROWS)
    trained.eval_dataset = ROWS[:1]
    try:
        assert trained.evaluate()["eval_statuses/ok"] == 2
    finally:
        trained.eval_dataset = None
    assert trained.evaluate() == stored


def test_the_start_is_evaluated_before_any_round_and_may_be_written_down(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run", num_rounds=1)
    metrics = found.evaluate(ROWS[:2])
    found.save_metrics("eval", metrics)
    found.train()
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_reward"] == metrics["eval_reward"]


def test_the_evaluation_of_an_adapter_is_that_of_its_round(unimproved: tuple[RaftTrainer, list[str]]) -> None:
    found, _ = unimproved
    metrics = found.evaluate(ROWS[:2])
    assert metrics["epoch"] == 0.0
    assert metrics["eval_statuses/ok"] == 4


# -- the start is best -----------------------------------------------------------------------------------------------


def test_a_start_that_is_best_is_warned_of(unimproved: tuple[RaftTrainer, list[str]]) -> None:
    _, lines = unimproved
    assert sum("No round was better than the start" in line for line in lines) == 1


def test_the_start_of_an_adapter_is_saved_as_one_of_zero_effect(
    unimproved: tuple[RaftTrainer, list[str]], tmp_path: Path
) -> None:
    found, _ = unimproved
    found.save_model(tmp_path / "saved")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), logits(tiny_llama()))
    assert torch.equal(logits(found.model), logits(tiny_llama()))
    assert isinstance(found.model, PeftModel)
    assert "AutoPeftModelForCausalLM" in (tmp_path / "saved" / "README.md").read_text()


# -- what scripts end with -------------------------------------------------------------------------------------------


def test_a_script_s_last_lines_work(trained: RaftTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    output = trained.train(resume_from_checkpoint=True)
    last = trained.state.log_history[-1]
    assert last["train_loss"] == output.training_loss == output.metrics["train_loss"]
    assert last["train_runtime"] > 0
    metrics = output.metrics | {"train_samples": len(ROWS)}
    trained.log_metrics("train", metrics)
    trained.save_metrics("train", metrics)
    trained.save_state()
    assert "train_samples" in capsys.readouterr().out
    root = Path(trained.args.output_dir)
    assert json.loads((root / "train_results.json").read_text())["train_loss"] == output.training_loss
    assert json.loads((root / "trainer_state.json").read_text())["global_step"] == trained.state.global_step
    assert trained.accelerator.is_main_process
    assert trained.is_world_process_zero()
    assert trained.accelerator.unwrap_model(trained.model) is trained.model
    assert trained.hub_model_id == root.name
    assert trained.tokenizer is trained.processing_class
    assert Path(trained.state.best_model_checkpoint).is_dir()


def test_a_model_card_holds_the_given_fields(trained: RaftTrainer) -> None:
    trained.create_model_card(model_name="mine", dataset_name="theirs/set", tags=["a"])
    text = (Path(trained.args.output_dir) / "README.md").read_text()
    head = text.split("---\n")[1]
    assert "model_name: mine" in head
    assert "- theirs/set" in head
    assert "- a" in head
    assert "## By round" in text


def test_a_push_takes_what_belongs_into_the_card(trained: RaftTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    seen: dict[str, Any] = {}

    def upload(self: Any, *, folder_path: str, **options: Any) -> str:
        seen.update(options, card=Path(folder_path, "README.md").read_text())
        return "sent"

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: type("Url", (), {"repo_id": name}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert trained.push_to_hub(dataset_name="theirs/set", tags="a", token="secret") == "sent"
    assert "- theirs/set" in seen["card"]
    assert "dataset_name" not in seen


def test_what_a_run_has_not_is_explained(trained: RaftTrainer) -> None:
    with pytest.raises(AttributeError, match="has no 'get_train_dataloader': each round trains on rows"):
        trained.get_train_dataloader()
    assert not hasattr(trained, "nothing_of_this_name")


class Watcher(TrainerCallback):
    """Writes down what models it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look("begin", kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look("end", kwargs)

    def _look(self, event: str, given: dict[str, Any]) -> None:
        assert given["processing_class"] is not None
        self.seen.append((event, isinstance(given["model"], PeftModel), logits(given["model"])))


class Other(TrainerCallback):
    """One that is taken out again."""


def test_callbacks_are_shown_the_model_of_the_round(tmp_path: Path) -> None:
    watcher = Watcher()
    found = trainer(tmp_path / "run", num_rounds=1, num_eval_prompts=0, peft_config=LORA, callbacks=[watcher])
    assert isinstance(found.model, PeftModel)
    assert found.model.get_nb_trainable_parameters()[0] > 0
    found.add_callback(Other)
    assert isinstance(found.pop_callback(Other), Other)
    found.train()
    (begin, adapted, before), (end, _, after) = watcher.seen
    assert (begin, adapted, end) == ("begin", True, "end")
    assert torch.equal(before, logits(tiny_llama()))
    assert torch.equal(after, logits(found.model))
    assert not torch.equal(before, after)


# -- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_a_stream_only_what_the_rounds_need_is_read(tmp_path: Path) -> None:
    read: list[int] = []

    def endless() -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            read.append(number)
            yield {"prompt": f"say {number}"}

    found = trainer(tmp_path / "run", train_dataset=IterableDataset.from_generator(endless))
    assert len(read) == 2 * 4 + 2  # rounds of four prompts, and two held out
    found.train()
    longer = trainer(tmp_path / "run", train_dataset=IterableDataset.from_generator(endless), num_rounds=3)
    longer.train()
    assert longer.state.epoch == 3.0


def test_columns_that_are_not_used_are_removed_on_request(tmp_path: Path) -> None:
    def sees(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert "wanted" not in columns
        return length(completions)

    found = trainer(tmp_path / "run", sees, remove_unused_columns=True, num_rounds=1)
    assert found.train().global_step > 0


# -- notebooks -------------------------------------------------------------------------------------------------------


def test_a_configuration_survives_pickling() -> None:
    args = RaftConfig(output_dir="somewhere", use_cpu=True, epsilon=0.2, selection={"rule": "top_m", "m": 2})
    assert pickle.loads(pickle.dumps(args)) == args


@pytest.mark.parametrize("given", [None, False, True, "run", "run/checkpoint-3"])
def test_every_option_for_resuming_resumes(given: Any, trained: RaftTrainer) -> None:
    root = Path(trained.args.output_dir)
    assert trained.train(resume_from_checkpoint=str(root.parent / given) if isinstance(given, str) else given)


def test_arguments_that_a_later_cell_changes_take_effect(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run", num_rounds=1, num_eval_prompts=0)
    found.args.max_steps = 1
    assert found.train().global_step == 1
    found.args.temperature = 0.5
    with pytest.raises(ConfigError, match=r"temperature: 1\.0 → 0\.5"):
        found.train()


def test_what_cannot_be_trained_is_refused_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = trainer(tmp_path / "run", num_rounds=1, optim="paged_adamw_8bit")
    with pytest.raises(ConfigError, match="optim: paged_adamw_8bit needs the package bitsandbytes"):
        found.train()
    changed = {"training.optim": "adam"}
    found = trainer(tmp_path / "run", num_rounds=1, run_config={"engine.threads": 1, **changed})
    with pytest.raises(ConfigError, match="adam is not a valid OptimizerNames"):
        found.train()
    assert not (tmp_path / "run" / "round-0000").exists()


def test_a_script_logs_numbers_of_its_own(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run", logging_steps=0.1)
    found.log({"mine": 2.0})
    assert found.state.log_history[-1]["mine"] == 2.0
    assert found.get_num_trainable_parameters() == sum(weight.numel() for weight in tiny_llama().parameters())


def test_an_interrupt_leaves_train_from_wherever_it_comes(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    found = trainer(tmp_path / "run", num_rounds=2, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        found.train()
    assert not (tmp_path / "run" / "round-0002").exists()
    with pytest.raises(KeyboardInterrupt):
        found.evaluate(ROWS[:1], metric_key_prefix=Interrupting("eval"))


@pytest.mark.slow
def test_an_interrupt_that_a_reward_swallows_is_no_score(tmp_path: Path) -> None:
    stop = str(tmp_path / "stop")
    Path(stop).touch()

    def swallowing(completions: list[str], **columns: Any) -> list[float]:
        try:
            if Path(stop).exists() and len(completions) == 12:  # a round's samples, and not those of an evaluation
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        except BaseException:
            return [0.0] * len(completions)
        return length(completions)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "a", swallowing, num_rounds=1).train()
    Path(stop).unlink()
    for folder in ("a", "b"):
        trainer(tmp_path / folder, swallowing, num_rounds=1).train()
    assert samples(tmp_path / "a") == samples(tmp_path / "b")


def test_the_first_interrupt_lets_a_step_end_and_the_second_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt), leaving_on_interrupt(), interruption.stretch(lambda: "three steps"):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            done.append(f"step after {times}")
    assert done == ["step after 1"]
    assert "stopping after the current step: three steps" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not interruption.asked()


def test_a_script_s_own_handler_of_interrupts_is_left_in_place(tmp_path: Path) -> None:
    seen: list[int] = []

    def own(number: int, frame: Any) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, own)
    try:
        found = trainer(tmp_path / "run", interrupting_once(tmp_path / "once"), num_rounds=1, num_eval_prompts=0)
        assert found.train().global_step > 0
        assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def interrupting_once(marker: Path) -> Any:
    """A reward whose first call sends the process an interrupt."""
    marker.touch()
    place = str(marker)

    def interrupting(completions: list[str], **columns: Any) -> list[float]:
        if Path(place).exists():
            Path(place).unlink()
            os.kill(os.getpid(), signal.SIGINT)
        return length(completions)

    return interrupting


class Interrupting(str):
    """A prefix that Ctrl-C comes with."""

    def __format__(self, spec: str) -> str:
        raise KeyboardInterrupt


# -- words -----------------------------------------------------------------------------------------------------------


def test_advice_is_in_python() -> None:
    for message, said in {
        "Fix the reward and run `raftune resume RUN --from score`.": "Fix the reward and run `train(redo='score')`.",
        "`raftune resume RUN --from score --only error`": "`train(redo='score', only='error')`",
        "Put back, or add `--from 1/select` to redo it.": "Put back, or call train(redo='1/select') to redo it.",
        "Resume with: raftune resume 'out y/b 1'": "Resume with: `train()`",
        "`raftune resume runs/a --from 2/train --keep-models all`": "`train(redo='2/train')` with keep_models='all'",
        "sampling.top_k must be 3": "top_k must be 3",
        "--from must be STAGE; got 'x'. Write --from 3/select, for example.": "redo must be STAGE; got 'x'. "
        "Write redo='3/select', for example.",
        "Restore it, or redo its stage with `--from`.": "Restore it, or redo its stage with train(redo=STAGE).",
    }.items():
        assert in_python(message) == said


def test_rounds_with_nothing_to_learn_from_go_on_and_are_warned_of(tmp_path: Path) -> None:
    def nothing(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    given = {"num_rounds": 4, "num_eval_prompts": 0, "empty_rounds": 2, "peft_config": LORA}
    found = trainer(tmp_path / "run", nothing, **given)
    with warned() as lines:
        outcome = found.train()
    assert (outcome.global_step, outcome.training_loss) == (0, 0.0)
    assert found.state.epoch == 2.0
    said = "\n".join([*lines, outcome.metrics["stopped_because"]])
    assert "nothing to learn" in said
    assert not re.search(r"raftune (resume|train)|--from|--selection", said)
    found.save_model(tmp_path / "saved")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), logits(tiny_llama()))


def test_a_failing_reward_is_explained_without_command_lines(tmp_path: Path) -> None:
    def failing(completions: list[str], **columns: Any) -> list[float]:
        raise ValueError("no")

    found = trainer(tmp_path / "run", failing, num_rounds=1, num_eval_prompts=0)
    with pytest.raises(RaftuneError, match=r"train\(redo='score', only='error'\)") as told:
        found.train()
    assert not re.search(r"raftune (resume|train)|--from|`raftune", str(told.value))


def test_a_second_cell_with_other_arguments_gets_the_difference(trained: RaftTrainer) -> None:
    root = Path(trained.args.output_dir)
    again = trainer(root, num_rounds=1, train_dataset=Dataset.from_list(ROWS), temperature=0.5)
    with pytest.raises(ConfigError, match=r"temperature: 1\.0 → 0\.5"):
        again.train()
