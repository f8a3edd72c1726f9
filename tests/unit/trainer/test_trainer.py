"""RaftConfig and what a trainer is given: an argument takes effect or is refused with why; objects enter by content."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, HfArgumentParser, TrainingArguments
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

import raftune
from raftune.config.training import TRAINER_KWARGS
from raftune.errors import ConfigError, DataError, ModelError
from raftune.trainer import RaftConfig, RaftTrainer
from raftune.trainer.arguments import BORROWED, MAPPED, ONLY_WITH, QUIET, REFUSED, WITHOUT, default_of
from raftune.trainer.config import OWN, TABLE, flat_names, run_of
from raftune.trainer.inputs import prompt_inputs, reward_inputs, table_hash
from raftune.trainer.models import adapter_section, model_hash, model_inputs, tokenizer_hash
from tests.builders import tiny_llama, tiny_tokenizer

torch.set_num_threads(1)

GIVEN = {"policy": {"family": "causal_lm", "model": "-"}, "data": {"prompts": "-"}}
ROWS = [{"prompt": f"say {number}"} for number in range(12)]
INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}
OF_GRPO = sorted({field.name for field in dataclasses.fields(GRPOConfig)} - INHERITED)
READ = {*TABLE, *TRAINER_KWARGS, *OWN}
# A value of each mapped argument that is not its default.
CHANGED: dict[str, Any] = {
    "output_dir": "elsewhere",
    "seed": 7,
    "num_rounds": 3,
    "prompts_per_round": 5,
    "keep_models": "best",
    "num_generations": 3,
    "max_completion_length": 9,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 11,
    "min_p": 0.05,
    "repetition_penalty": 1.2,
    "generation_kwargs": {"num_beams": 2},
    "chat_template_kwargs": {"loud": True},
    "beta": 0.5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "learning_rate": 1e-3,
    "num_train_epochs": 2.0,
    "max_steps": 4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.25,
    "weight_decay": 0.1,
    "max_grad_norm": 0.3,
    "optim": "sgd",
    "bf16": True,
    "gradient_checkpointing": True,
    "save_steps": 9,
    "mask_truncated_completions": True,
    "replay_rounds": 1,
    "start_from": "start",
    "num_eval_prompts": 3,
    "num_generations_eval": 2,
    "metric_for_best_model": "polite",
    "trust_remote_code": True,
    "empty_rounds": 1,
    "workers": 2,
    "processes": 2,
    "parallel": "fsdp",
}


def config(**changes: Any) -> RaftConfig:
    return RaftConfig(**{"output_dir": "somewhere", "use_cpu": True, **changes})


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """What raftune's logger says meanwhile, a text each."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("raftune").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("raftune").removeHandler(handler)


def trainer(**changes: Any) -> RaftTrainer:
    given: dict[str, Any] = {"model": tiny_llama(), "reward_funcs": len_of, "args": config(), "train_dataset": ROWS}
    return RaftTrainer(**{**given, "processing_class": tiny_tokenizer(), **changes})


def len_of(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


# -- every argument takes effect -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"use_cpu"}))
def test_a_flat_argument_becomes_the_field_that_the_table_names(name: str) -> None:
    dumped = run_of(config(**{name: CHANGED[name]}), GIVEN).model_dump(mode="json")
    plain = run_of(config(), GIVEN).model_dump(mode="json")
    for part in TABLE[name].split("."):
        dumped, plain = dumped[part], plain[part]
    assert dumped == CHANGED[name]
    assert plain != dumped


def test_the_table_covers_exactly_what_is_tested() -> None:
    assert set(CHANGED) | {"use_cpu"} == set(TABLE)


def test_use_cpu_chooses_the_device() -> None:
    assert run_of(config(), GIVEN).policy.device == "cpu"
    assert run_of(config(use_cpu=False), GIVEN).policy.device == "auto"


@pytest.mark.parametrize("name", ["adam_beta2", "neftune_noise_alpha", "dataloader_drop_last"])
def test_what_only_transformers_reads_is_passed_on_where_it_is_set(name: str) -> None:
    value = {"adam_beta2": 0.95, "neftune_noise_alpha": 5.0, "dataloader_drop_last": True}[name]
    assert run_of(config(**{name: value}), GIVEN).training.trainer_kwargs == {name: value}
    assert run_of(config(), GIVEN).training.trainer_kwargs == {}


def test_a_selection_is_a_rule_or_its_fields() -> None:
    assert run_of(config(selection="random"), GIVEN).selection.rule == "random"
    chosen = run_of(config(selection={"rule": "top_m", "m": 2}, beta=0.1), GIVEN).selection
    assert (chosen.rule, chosen.m, chosen.beta) == ("top_m", 2, 0.1)


def test_beta_is_reported_once() -> None:
    assert run_of(config(selection={"beta": 0.2}), GIVEN).selection.beta == 0.2
    with pytest.raises(ConfigError, match=r"beta must be said once; got 0\.1 and 0\.2 in selection"):
        config(selection={"beta": 0.2}, beta=0.1)


def test_what_has_no_flat_name_goes_through_run_config() -> None:
    given = {"training.loss_normalization": "sample", "stop": {"patience": 3}}
    found = run_of(config(run_config=given), GIVEN)
    assert (found.training.loss_normalization, found.stop.patience) == ("sample", 3)
    assert given == {"training.loss_normalization": "sample", "stop": {"patience": 3}}
    with pytest.raises(
        ConfigError, match=r"training\.loss_normalisation is not a field; did you mean 'loss_normalization'"
    ):
        config(run_config={"training.loss_normalisation": "sample"})


def test_the_best_round_is_named_as_transformers_names_metrics() -> None:
    for name in ("polite", "rewards/polite/mean", "eval_rewards/polite/mean"):
        assert run_of(config(metric_for_best_model=name), GIVEN).evaluation.best_by == "polite"
    assert run_of(config(load_best_model_at_end=True), GIVEN).evaluation.best_by == "reward"


def test_a_copy_with_a_change_is_a_valid_configuration() -> None:
    copied = dataclasses.replace(config(eval_strategy="epoch"), learning_rate=1e-3)
    assert run_of(copied, GIVEN).training.learning_rate == 1e-3


def test_rules_of_values_are_reported_under_the_flat_names_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"^num_generations must be greater than or equal to 1; got 0"):
        config(num_generations=0)
    with pytest.raises(ConfigError, match=r"^learning_rate must be greater than 0; got -1"):
        config(learning_rate=-1.0)
    assert flat_names("policy.model and sampling.top_k") == "model and top_k"


# -- every other argument changes nothing, has no part, or is refused -------------------------------------------------


def test_every_argument_of_both_trainers_is_read_or_has_a_verdict() -> None:
    assert {*OF_GRPO} <= {*BORROWED, *READ}
    verdicts = [*READ, *MAPPED, *QUIET, *WITHOUT, *REFUSED]
    assert not (INHERITED | {*BORROWED}) - {*verdicts}
    assert len(verdicts) == len({*verdicts})


def test_the_guide_names_every_argument_that_is_mapped_warned_of_or_refused() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "from_grpo.md").read_text()
    shortened = ("sapo_", "vespo_", "torch_compile_")
    named = [name for name in (*MAPPED, *WITHOUT, *REFUSED) if not name.startswith(shortened)]
    assert [name for name in named if f"`{name}" not in guide] == []


def test_borrowed_arguments_have_the_defaults_of_trl() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    ours = {name: default for name, (_, default) in BORROWED.items() if name in theirs}
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_give_another_model_is_refused_with_why(name: str) -> None:
    also = {ONLY_WITH[name]: STRANGE.get(ONLY_WITH[name], "reward")} if name in ONLY_WITH else {}
    value = STRANGE.get(name, True)
    with pytest.raises(
        ConfigError, match=rf"^{name} must stay at .*; got {re.escape(repr(value))}: .{{20,}}\. Delete it"
    ):
        config(**{name: value}, **also)
    with warned() as lines:
        config(**{name: value}, **also, strict=False)
    assert name in "".join(lines)


STRANGE = {"shuffle_dataset": False, "greater_is_better": False, "entropy_coef": 0.01, "top_entropy_quantile": 0.2}
STRANGE |= {"multi_objective_aggregation": "normalize_then_sum", "router_aux_loss_coef": 0.1, "beta": 0.1}
STRANGE |= {"vllm_structured_outputs_regex": "a+", "vllm_guided_decoding_regex": "a+", "use_vllm": True}


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_a_part_that_raft_has_not_is_warned_of_once(name: str) -> None:
    also = {"push_to_hub": True} if name == "hub_strategy" else {}
    value = {"hub_strategy": "checkpoint", "debug": "underflow_overflow"}.get(name, 7)
    with warned() as lines:
        config(**{name: value}, **also)
    assert len(lines) == 1
    assert f" {name}: " in lines[0] or f" {name}," in lines[0] or f", {name}" in lines[0]


@pytest.mark.parametrize("name", sorted({*QUIET} - {"eval_strategy", "save_strategy", "load_best_model_at_end"}))
def test_what_changes_nothing_is_accepted_without_a_word(name: str) -> None:
    given = {"include_num_input_tokens_seen": "all", "accelerator_config": {"split_batches": False}}
    with warned() as lines:
        config(**{name: given.get(name, 3)})
    assert lines == []


def test_defaults_that_are_written_out_are_accepted_without_a_word() -> None:
    """Of both trainers, as a pasted script, a parser or a saved YAML file holds them."""
    theirs = {field.name: default_of(GRPOConfig, field.name) for field in dataclasses.fields(GRPOConfig) if field.init}
    with warned() as lines:
        config(**{**theirs, "output_dir": "somewhere", "use_cpu": True, "bf16": False, "top_k": -1})
        config(eval_strategy="steps", eval_steps=10, save_strategy="best", load_best_model_at_end=True, do_train=True)
        config(fsdp="", delta=None, scale_rewards=True, num_iterations=1, log_on_each_node=False, dataset_num_proc=4)
        config(ddp_find_unused_parameters=False, vllm_gpu_memory_utilization=0.9, debug=None, max_prompt_length=None)
    assert lines == []


def test_what_a_run_gives_in_another_way_is_mapped() -> None:
    found = run_of(config(top_k=-1, warmup_ratio=0.1, save_total_limit=2, num_iterations=3, num_train_epochs=2), GIVEN)
    assert (found.sampling.top_k, found.training.warmup_steps, found.keep_models) == (0, 0.1, "best")
    assert found.training.num_train_epochs == 6
    assert run_of(config(max_prompt_length=512), GIVEN).sampling.max_prompt_length == 512
    assert run_of(config(save_total_limit=9, save_steps=0.1), GIVEN) == run_of(config(), GIVEN)
    assert run_of(config(warmup_steps=3, warmup_ratio=0.1), GIVEN).training.warmup_steps == 3
    assert run_of(config(use_cpu=False, no_cuda=True), GIVEN).policy.device == "cpu"


def test_all_that_must_go_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as found:
        config(entropy_coef=0.2, shuffle_dataset=False, num_generation=4, learning_rate=-1.0, temperature=-1.0)
    lines = str(found.value).splitlines()
    named = ["shuffle_dataset", "entropy_coef", "num_generation", "temperature", "learning_rate"]
    assert sorted(line.split(" ")[0] for line in lines) == sorted(named)
    assert any("did you mean 'num_generations'?" in line for line in lines)


def test_hints_lead_to_arguments_that_have_an_effect() -> None:
    for name in ("epsilonn", "use_vlm", "los_type"):
        with pytest.raises(ConfigError) as found:
            config(**{name: 1})
        hint = re.findall("did you mean '(.*)'", str(found.value))
        assert not {*hint} & {*WITHOUT, *REFUSED, *QUIET}


def test_the_arguments_that_are_logged_are_those_that_are_read() -> None:
    logged = config(epsilon=0.3).to_dict()
    assert "epsilon" not in logged
    assert logged["num_generations"] == 8


def test_a_launcher_of_one_process_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert config().mixed_precision == "no"


# -- command lines and files -----------------------------------------------------------------------------------------


def test_parsers_of_transformers_and_trl_give_what_the_constructor_gives(tmp_path: Path) -> None:
    plain = ["--output_dir", "somewhere", "--use_cpu"]
    (parsed,) = HfArgumentParser(RaftConfig).parse_args_into_dataclasses(plain, look_for_args_file=False)
    assert run_of(parsed, GIVEN) == run_of(config(), GIVEN)
    assert "Of GRPOConfig" in HfArgumentParser(RaftConfig).format_help()
    changes = {"num_generations": 3, "reward_weights": [1.0, 2.0], "selection": {"rule": "top_m", "m": 2}, "top_k": -1}
    changes |= {"use_vllm": False, "warmup_ratio": 0.1, "learning_rate": 1e-4, "save_total_limit": 1, "fsdp": ""}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(changes | {"output_dir": "elsewhere", "max_steps": 9}))
    flags = [*plain, "--config", str(file), "--max_steps", "4", "--temperature", "0.7", "--gradient_checkpointing"]
    parser = TrlParser((RaftConfig,))
    with warned() as lines:
        (parsed,) = parser.parse_args_and_config(flags)
    same = config(**changes, max_steps=4, temperature=0.7, gradient_checkpointing=True)
    assert run_of(parsed, GIVEN) == run_of(same, GIVEN)
    assert lines == []


def test_a_configuration_is_parsed_beside_trl_s_own(tmp_path: Path) -> None:
    flags = [
        "--model_name_or_path",
        "m",
        "--dataset_name",
        "d",
        "--use_cpu",
        "--selection",
        '{"rule": "top_m", "m": 2}',
    ]
    script, args, model = TrlParser((ScriptArguments, RaftConfig, ModelConfig)).parse_args_and_config(flags)
    assert (script.dataset_name, model.model_name_or_path) == ("d", "m")
    assert run_of(args, GIVEN).selection.m == 2


# -- what a trainer is given ------------------------------------------------------------------------------------------


def test_a_launcher_with_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="must be one process; got WORLD_SIZE=2"):
        config()


def test_a_schedule_that_goes_by_evaluations_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr_scheduler_type must go by steps; got reduce_lr_on_plateau"):
        config(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")


def test_grpo_arguments_are_not_taken_for_ours() -> None:
    with pytest.raises(ConfigError, match="args must be a RaftConfig; got TrainingArguments"):
        trainer(args=TrainingArguments(output_dir="x", use_cpu=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": (object(), None)}, r"optimizers must be \(None, None\)"),
        ({"train_dataset": None}, "train_dataset must be given; got None"),
        ({"train_dataset": {"train": ROWS}}, "train_dataset must be one data set; got a dictionary of train"),
        ({"train_dataset": 3}, "train_dataset must be a datasets.Dataset, a pandas frame or a list of rows; got int"),
        ({"eval_dataset": 3}, "eval_dataset must be a datasets.Dataset, a pandas frame or a list of rows; got int"),
        ({"reward_funcs": []}, "reward_funcs must hold at least one reward; got none"),
        ({"model": 3}, "model must be a name, a folder, or a model of transformers or peft; got int"),
        ({"processing_class": "gpt2"}, "processing_class must be a tokenizer; got str"),
        (
            {"peft_config": PrefixTuningConfig(num_virtual_tokens=2)},
            "peft_config must be a LoraConfig; got PrefixTuning",
        ),
        ({"tools": [len_of]}, "tools must be None: a sample is one completion"),
        ({"rollout_func": len_of}, "rollout_func must be None: raftune's own sampler"),
        ({"environment_factory": len_of}, "environment_factory must be None: a sample is one completion"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "quantization_config must be left out where"),
        (
            {"args": config(reward_weights=[1.0, 2.0])},
            "reward_weights must hold one entry for each reward; got 2 for 1",
        ),
        ({"args": config(report_to="nowhere")}, "report_to must name what is installed"),
    ],
)
def test_what_a_trainer_cannot_use_is_refused_when_it_is_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        trainer(**changes)


def test_one_tokenizer_is_not_taken_for_several_rewards() -> None:
    """Two reward models have tokenizers of their own."""
    with pytest.raises(ConfigError, match="reward_processing_classes must hold one entry for each reward; got 1 for 2"):
        reward_inputs([len_of, len_of], tiny_tokenizer(), None)


# -- models ----------------------------------------------------------------------------------------------------------


def named(**init: Any) -> dict[str, Any]:
    return model_inputs("some/model", None, None, init, False).policy


def test_a_named_model_is_loaded_in_float32_by_default() -> None:
    assert run_of(config(), {**GIVEN, "policy": named()}).policy.dtype == "float32"
    for dtype in (torch.bfloat16, "bfloat16"):
        assert named(dtype=dtype) == {"family": "causal_lm", "model": "some/model", "dtype": "bfloat16"}


def test_what_from_pretrained_takes_is_passed_on_as_plain_data() -> None:
    assert named(revision="main", subfolder="a")["model_init_kwargs"] == {"subfolder": "a"}
    with pytest.raises(ConfigError, match=r"model_init_kwargs\.key_mapping must be plain data"):
        named(key_mapping=object())
    with warned() as lines:
        assert named(device_map="auto") == named()
        assert named(device_map="balanced", use_cache=False) == named()
    assert ["device_map has no part" in line for line in lines] == [True]


def test_a_four_bit_model_is_qlora_and_nothing_else() -> None:
    assert named(quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))["load_in_4bit"]
    for other in ({"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}):
        with pytest.raises(ConfigError, match="must be 4-bit NF4"):
            named(quantization_config=BitsAndBytesConfig(**other))


def test_quantization_is_reported_as_in_trl() -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    given = {"model": "some/model", "processing_class": tiny_tokenizer(), "peft_config": LoraConfig(target_modules="q")}
    assert trainer(**given, quantization_config=nf4).run_config.policy.load_in_4bit
    with pytest.raises(ConfigError, match=r"^quantization_config must be 4-bit NF4"):
        trainer(**given, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_all_that_a_trainer_cannot_use_is_named_at_once() -> None:
    lora = LoraConfig(use_dora=True, bias="all")
    with pytest.raises(ConfigError) as found:
        trainer(tools=[len_of], optimizers=(object(), None), peft_config=lora, reward_funcs=[], train_dataset=3)
    starts = [line.split(" ")[0] for line in str(found.value).splitlines()]
    assert starts == [
        *("tools", "optimizers", "peft_config.bias", "peft_config.use_dora", "reward_funcs", "train_dataset")
    ]
    with warned() as lines:
        found = trainer(args=config(strict=False), tools=[len_of], optimizers=(object(), None), peft_config=lora)
    assert [name for name in starts if name in "".join(lines)] == starts[:4]
    assert found.run_config.policy.adapter is not None


def test_a_lora_config_is_carried_whole_or_refused() -> None:
    given = LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], modules_to_save=["lm_head"]
    )
    section = {
        "r": 4,
        "alpha": 12,
        "dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["lm_head"],
    }
    assert adapter_section(given, None) == section
    for name, value in {"use_dora": True, "bias": "all", "rank_pattern": {"q": 2}}.items():
        with pytest.raises(ConfigError, match=rf"peft_config\.{name} must stay at"):
            adapter_section(LoraConfig(**{name: value}), None)


def test_the_scale_of_rslora_is_carried_as_an_alpha() -> None:
    given = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")
    assert adapter_section(given, None)["alpha"] == 16


def test_a_lora_config_without_modules_means_those_that_peft_knows() -> None:
    model = tiny_llama()
    found = model_inputs(model, tiny_tokenizer(), LoraConfig(), {}, False).policy["adapter"]["target_modules"]
    ours = {name.rsplit(".", 1)[-1] for name in get_peft_model(tiny_llama(), LoraConfig()).targeted_module_names}
    assert set(found) == ours


def test_an_adapter_on_an_object_is_trained_on_in_its_own_shape() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"]))
    assert model_inputs(model, tiny_tokenizer(), None, {}, False).policy["adapter"]["r"] == 3


def test_a_model_object_needs_a_tokenizer() -> None:
    with pytest.raises(ModelError, match="processing_class must be given where the model has no tokenizer of its own"):
        trainer(processing_class=None)


def test_the_hash_of_a_model_is_that_of_its_copy_and_of_no_other() -> None:
    model = tiny_llama()
    same, other = copy.deepcopy(model).train(), copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = [2, 3]
    assert model_hash(model) == model_hash(same)
    assert len({model_hash(one) for one in (model, other, ending, copy.deepcopy(model).to(torch.bfloat16))}) == 4


def test_the_hash_of_a_tokenizer_forgets_how_it_was_called_and_where_it_lay(tmp_path: Any) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(type(tokenizer).from_pretrained(tmp_path))
    assert before != tokenizer_hash(tiny_tokenizer(chat=False))


# -- rewards and data ------------------------------------------------------------------------------------------------


def test_rewards_have_the_names_that_trl_gives_them() -> None:
    found = reward_inputs([len_of, lambda completions, **_: [0.0], "starter"], None, [1.0, 2.0, 3.0])
    assert [reward.name for reward in found.objects] == ["len_of", "reward_1"]
    assert (found.weights, found.specs) == ([1.0, 2.0], [{"spec": "starter", "weight": 3.0}])


def test_tokenizers_of_rewards_match_them_in_number() -> None:
    with pytest.raises(ConfigError, match="reward_processing_classes must hold one entry for each reward; got 2 for 1"):
        reward_inputs([len_of], [None, None], None)


def test_the_hash_of_rows_is_that_of_their_content() -> None:
    table = pa.Table.from_pylist(ROWS)
    chunked = pa.concat_tables([table.slice(0, 5), table.slice(5)]).replace_schema_metadata({"a": "b"})
    assert table_hash(table) == table_hash(chunked)
    assert table_hash(table) != table_hash(table.slice(1))
    assert table_hash(table) != table_hash(table.rename_columns(["question"]))


def test_rows_of_a_list_keep_every_column() -> None:
    table = prompt_inputs([{"prompt": "a"}, {"prompt": "b", "answer": 2}], "train_dataset").table
    assert table is not None and table().column("answer").to_pylist() == [None, 2]


def test_a_data_set_by_name_is_read_by_the_run() -> None:
    given = prompt_inputs("prompts.jsonl", "train_dataset")
    assert (given.source, given.table) == ("prompts.jsonl", None)


def test_the_names_are_found_on_the_package() -> None:
    assert (raftune.RaftTrainer, raftune.RaftConfig) == (RaftTrainer, RaftConfig)
