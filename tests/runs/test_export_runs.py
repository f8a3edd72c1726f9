"""What is taken from a language model's run: its model with a card, and its samples as TRL's data sets."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from raftune.cli import main
from raftune.config.load import merge, validate
from raftune.errors import ConfigError, StoreError
from raftune.results.export import export
from raftune.results.model_card import base_name, publish_model, summary
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run, verify
from raftune.store.commit import DroppedFiles
from raftune.store.run import RunFolder
from raftune.training.quiet import quiet
from tests.builders import save_tiny, tiny_model, tiny_tokenizer


def config(root: Path, model: Path, **changes: Any) -> Any:
    base = {
        "name": "taken",
        "output_dir": str(root),
        "num_rounds": 2,
        "prompts_per_round": 4,
        "data": {"prompts": "objects"},
        "policy": {"model": str(model)},
        "sampling": {"num_generations": 4, "max_completion_length": 8, "system_prompt": "be brief"},
        "rewards": {"reward_funcs": [{"spec": "length", "options": {"target": 3, "unit": "characters"}}]},
        "training": {"learning_rate": 1e-3},
        "evaluation": {"num_prompts": 2, "num_generations": 2, "kl": False},
        "engine": {"threads": 1},
    }
    return validate(merge([base, changes]))


def prompts() -> pa.Table:
    return pa.table({"prompt": [f"say {number}" for number in range(6)]})


def held_out() -> pa.Table:
    return pa.table({"prompt": ["say it", "say so"]})


def objects(**more: Any) -> PythonObjects:
    return PythonObjects(train=prompts, held_out=held_out, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("taken")
    save_tiny(base / "model", bos=True)
    run(config(base / "run", base / "model"), objects())
    lora = {"policy": {"adapter": {"r": 2}}}
    run(config(base / "lora", base / "model", **lora), objects())
    run(
        config(base / "given", base / "model", num_rounds=1, **lora),
        objects(model=tiny_model("llama", 1), tokenizer=tiny_tokenizer()),
    )
    return base


def weights(path: Path) -> dict[str, torch.Tensor]:
    with quiet():
        return dict(AutoModelForCausalLM.from_pretrained(path).state_dict())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_published_model_is_the_committed_one_and_the_run_is_untouched(folder: Path, tmp_path: Path) -> None:
    publish_model(folder / "run", tmp_path / "out", 2)
    taken, committed = weights(tmp_path / "out"), weights(folder / "run/round-0002/model")
    assert all(torch.equal(taken[name], committed[name]) for name in committed)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("say")["input_ids"]
    assert not {"_COMMIT.json", "training.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert verify(folder / "run") == []


def test_the_start_is_published_from_its_own_folder(folder: Path, tmp_path: Path) -> None:
    publish_model(folder / "run", tmp_path / "out", 0)
    taken, start = weights(tmp_path / "out"), weights(folder / "model")
    assert all(torch.equal(taken[name], start[name]) for name in start)


def test_an_adapter_comes_with_its_tokenizer_and_finds_its_base(folder: Path, tmp_path: Path) -> None:
    publish_model(folder / "lora", tmp_path / "out", 2)
    with quiet():
        model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.peft_config["default"].base_model_name_or_path == str(folder / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("say")["input_ids"]


def test_the_card_counts_the_prompts_that_the_rounds_really_asked(folder: Path) -> None:
    run_folder = RunFolder(folder / "run")
    asked_for_more = run_folder.configuration().model_copy(update={"prompts_per_round": 64})
    assert "4 completions to each of 4 prompts" in summary(run_folder, asked_for_more, 2)


def test_a_base_that_only_the_run_holds_is_published_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_model(folder / "given", tmp_path / "out", 1)
    monkeypatch.chdir(tmp_path)  # the base is found from anywhere
    with quiet():
        model = peft.AutoPeftModelForCausalLM.from_pretrained("out")
    base = weights(folder / "given/round-0000/model")
    assert torch.equal(model.get_base_model().get_input_embeddings().weight, base["model.embed_tokens.weight"])


def test_publishing_again_replaces_what_was_there(folder: Path, tmp_path: Path) -> None:
    publish_model(folder / "run", tmp_path / "out", 2)
    publish_model(folder / "lora", tmp_path / "out", 2)
    assert not (tmp_path / "out/model.safetensors").exists()
    with quiet():
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")


def test_dropped_weights_are_refused_with_the_way_to_make_them_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    DroppedFiles("not kept").save(run.folder(1, "model"), run.tmp)
    with pytest.raises(StoreError, match=r"round 1 .* were dropped.*--from 1/train --keep-models all"):
        publish_model(tmp_path / "run", tmp_path / "out", 1)


def test_the_card_says_what_the_model_is_and_nothing_of_this_machine(folder: Path, tmp_path: Path) -> None:
    publish_model(folder / "run", tmp_path / "out", 2)
    card = (tmp_path / "out/README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert "Round 2 of reward-ranked fine-tuning" in card
    assert "| **2** |" in card
    assert str(folder) not in card
    settings = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert settings["sampling"]["num_generations"] == 4


def test_the_card_of_an_adapter_loads_it_with_peft(folder: Path, tmp_path: Path) -> None:
    publish_model(folder / "lora", tmp_path / "out", 1)
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM.from_pretrained" in card


# -- the samples ----------------------------------------------------------------------------------------------------


def test_an_adapter_is_published_merged_as_a_plain_model_of_the_same_function(folder: Path, tmp_path: Path) -> None:
    publish_model(folder / "lora", tmp_path / "adapter", 2)
    assert main(["export", str(folder / "lora"), "--format", "model", "--merged", "--round", "2", "--out",
                 str(tmp_path / "plain")]) == 0  # fmt: skip
    assert not {"adapter_config.json", "parity.json", "base"} & {path.name for path in (tmp_path / "plain").iterdir()}
    ids = torch.arange(3, 20)[None]
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("say it") == tiny_tokenizer(bos=True)("say it")
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "The LoRA adapter is merged into its base: these are whole weights, in float32." in text
    assert "AutoModelForCausalLM.from_pretrained" in text and "library_name: transformers" in text
    with pytest.raises(ConfigError, match="--merged needs a round with a LoRA adapter"):
        publish_model(folder / "lora", tmp_path / "start", 0, merged=True)
    refused = ["export", str(folder / "lora"), "--format", "model", "--merged", "--round", "0"]
    assert main([*refused, "--out", str(tmp_path / "refused")]) == 2
    assert not (tmp_path / "refused").exists()  # the same command has to work where it was interrupted


def test_sft_rows_are_what_was_kept(folder: Path, tmp_path: Path) -> None:
    assert export(folder / "run", "sft", tmp_path / "a.jsonl", "1") == 4
    tuned = pq.read_table(folder / "run/round-0001/rows/rows.parquet").to_pylist()
    taken = sorted((row["prompt"], row["completion"]) for row in rows(tmp_path / "a.jsonl"))
    assert taken == sorted((row["prompt"], row["completion"]) for row in tuned)


def test_a_preference_is_the_best_against_the_worst_by_its_margin(folder: Path, tmp_path: Path) -> None:
    export(folder / "run", "preference", tmp_path / "a.parquet")
    taken = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert taken
    for row in taken:
        scores = [-abs(len(row[name]) - 3) / 3 for name in ("chosen", "rejected")]
        assert row["margin"] > 0
        assert math.isclose(scores[0] - scores[1], row["margin"])


def test_every_scored_sample_is_labelled(folder: Path, tmp_path: Path) -> None:
    assert export(folder / "run", "unpaired", tmp_path / "a.jsonl") == 2 * 4 * 4
    verdicts = [pq.read_table(path) for path in (folder / "run").glob("round-*/select/verdicts.parquet")]
    kept = sum(weight > 0 for table in verdicts for weight in table.column("weight").to_pylist())
    assert sum(row["label"] for row in rows(tmp_path / "a.jsonl")) == kept > 0


def test_a_folder_is_one_that_datasets_reads(folder: Path, tmp_path: Path) -> None:
    count = export(folder / "run", "sft", tmp_path / "set")
    loaded = datasets.load_from_disk(str(tmp_path / "set"))
    assert loaded.num_rows == count
    assert loaded.column_names == ["prompt", "completion", "weight"]


def test_tokens_are_those_generated_behind_the_prompt_as_it_is_trained_on(folder: Path, tmp_path: Path) -> None:
    export(folder / "run", "sft-tokens", tmp_path / "a.jsonl", "1")
    tuned = pq.read_table(folder / "run/round-0001/rows/rows.parquet").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    expected = []
    for row in tuned:
        prompt = tokenizer(row["prompt"])["input_ids"]  # without the system prompt, which is for generating only
        expected.append((prompt + row["completion_ids"], [-100] * len(prompt) + row["completion_ids"]))
    assert sorted((row["input_ids"], row["labels"]) for row in rows(tmp_path / "a.jsonl")) == sorted(expected)


def test_sfttrainer_trains_on_the_tokens_as_they_are(folder: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    export(folder / "run", "sft-tokens", tmp_path / "set", "1")
    rows_ = datasets.load_from_disk(str(tmp_path / "set"))
    args = SFTConfig(
        output_dir=str(tmp_path / "sft"),
        bf16=False,
        use_cpu=True,
        max_length=None,
        gradient_checkpointing=False,
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        trainer = SFTTrainer(model=model, args=args, train_dataset=rows_, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = {tuple(row["labels"]) for row in rows_}
    for labels in batch["labels"].tolist():
        assert any(labels[: len(row)] == list(row) and set(labels[len(row) :]) <= {-100} for row in learned)
    assert math.isfinite(trainer.train().training_loss)


def test_messages_are_exported_as_messages(folder: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "chat", chat=True)
    asked = [[{"role": "user", "content": f"say {number}"}] for number in range(4)]
    given = PythonObjects(train=lambda: pa.table({"prompt": asked}), held_out=held_out_messages)
    run(config(tmp_path / "run", tmp_path / "chat", num_rounds=1), given)
    export(tmp_path / "run", "sft", tmp_path / "a.jsonl")
    for row in rows(tmp_path / "a.jsonl"):
        assert row["prompt"] in asked
        assert [message["role"] for message in row["completion"]] == ["assistant"]


def held_out_messages() -> pa.Table:
    return pa.table({"prompt": [[{"role": "user", "content": "say it"}]]})


@pytest.mark.parametrize(
    ("kind", "name", "which", "message"),
    [
        ("sft", "a.csv", "all", r"must end in \.jsonl or \.parquet"),
        ("sft", "a.jsonl", "7", r"must be all, best or one of 1, 2; got '7'"),
        ("sft", "a.jsonl", "last", r"must be all, best or one of 1, 2; got 'last'"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    kind: str, name: str, which: str, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(folder / "run", kind, tmp_path / name, which)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="must not exist yet"):
        export(folder / "run", "sft", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "named"),
    [("gpt2", "gpt2"), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("starter", None), ("a/b/c", None)],
)
def test_a_card_names_the_base_that_others_can_fetch(model: str, named: str | None) -> None:
    config = validate({"data": {"prompts": "-"}, "policy": {"model": model}})
    assert base_name(config) == named
