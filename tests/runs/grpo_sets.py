"""Twenty-four argument sets of GRPO scripts, as TRL's documentation, its examples and well-known notebooks have them.

Each is what such a script passes to GRPOConfig and GRPOTrainer, with a model, data and a device that a test has: names
of models become a tiny one, `report_to` is left out, and a script's own GPU is the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, EarlyStoppingCallback, HfArgumentParser, LlamaForSequenceClassification
from trl import ModelConfig, ScriptArguments, TrlParser

from tests.builders import tiny_llama, tiny_tokenizer

ROWS = [{"prompt": f"say {number}", "answer": number % 7} for number in range(20)]
CHAT = [{"prompt": [{"role": "user", "content": f"say {number}"}]} for number in range(20)]


def num_unique_chars(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def correctness(prompts: list[str], completions: list[str], answer: list[int], **kwargs: Any) -> list[float]:
    return [-abs(len(text) - target) for text, target in zip(completions, answer, strict=True)]


def length_of_message(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(messages[0]["content"])) for messages in completions]


def tool(number: int) -> int:
    """A tool."""
    return number


def reward_model() -> Any:
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 1, tiny_tokenizer().pad_token_id
    return LlamaForSequenceClassification(config)


@dataclass(frozen=True)
class Script:
    """The arguments of one script. `refused` are the names that must go; none: it runs with the two names changed."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    trainer: Callable[[], dict[str, Any]] = dict
    refused: tuple[str, ...] = ()
    parse: str = ""  # yaml, or flags: how the script makes its configuration of them
    environment: dict[str, str] = field(default_factory=dict)
    trains: bool = False  # whether the test trains it, and does not only build it


GSM8K = {
    "learning_rate": 5e-6,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
    "warmup_ratio": 0.1,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "bf16": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "num_generations": 16,
    "max_prompt_length": 256,
    "max_grad_norm": 0.1,
    "max_completion_length": 786,
    "num_train_epochs": 1,
    "save_steps": 100,
    "log_on_each_node": False,
}
UNSLOTH = {
    "learning_rate": 5e-6,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
    "warmup_ratio": 0.1,
    "lr_scheduler_type": "cosine",
    "optim": "paged_adamw_8bit",
    "logging_steps": 1,
    "max_grad_norm": 0.1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_generations": 6,
    "max_steps": 250,
    "max_prompt_length": 256,
    "max_completion_length": 768,
    "save_steps": 250,
    "use_vllm": True,
    "report_to": "none",
}
OPEN_R1 = {
    "bf16": True,
    "use_vllm": True,
    "do_eval": False,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "Qwen2.5-1.5B-Open-R1-GRPO",
    "hub_strategy": "every_save",
    "learning_rate": 2e-5,
    "log_completions": True,
    "log_level": "info",
    "logging_first_step": True,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "max_prompt_length": 512,
    "max_completion_length": 1024,
    "max_steps": -1,
    "num_generations": 16,
    "num_train_epochs": 1,
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 16,
    "per_device_train_batch_size": 16,
    "push_to_hub": False,
    "reward_weights": [1.0, 1.0],
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "seed": 42,
    "warmup_ratio": 0.1,
}


def two_rewards() -> dict[str, Any]:
    return {"reward_funcs": [num_unique_chars, correctness]}


SCRIPTS: Sequence[Script] = (
    Script("quickstart", trains=True),
    Script(
        "vllm_colocate",
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3, "vllm_tensor_parallel_size": 1},
    ),
    Script("vllm_server", {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "node-1", "bf16": True}),
    Script("gsm8k", GSM8K | {"use_vllm": False}, two_rewards, trains=True),
    Script("unsloth", UNSLOTH, lambda: {"peft_config": LoraConfig(r=16, target_modules="all-linear")}),
    Script("open_r1", OPEN_R1, two_rewards, parse="yaml", trains=True),
    Script(
        "dr_grpo",
        {"loss_type": "dr_grpo", "scale_rewards": False, "beta": 0.0, "epsilon": 0.2, "num_generations": 8},
        trains=True,
    ),
    Script(
        "dapo",
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "mask_truncated_completions": True, "beta": 0.0}
        | {"num_iterations": 1, "steps_per_generation": 4, "top_k": -1},
        trains=True,
    ),
    Script(
        "gspo",
        {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "loss_type": "grpo"}
        | {"beta": 0.0, "gradient_accumulation_steps": 1, "steps_per_generation": 4},
    ),
    Script(
        "lora",
        {
            "learning_rate": 1e-5,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        lambda: {
            "peft_config": LoraConfig(
                task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear"
            )
        },
        trains=True,
    ),
    Script(
        "qlora",
        {"bf16": True, "optim": "paged_adamw_8bit"},
        lambda: {
            "model": "Qwen/Qwen2.5-0.5B-Instruct",
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=True,
            ),
            "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
        },
    ),
    Script("reward_weights", {"reward_weights": [0.5, 1.0], "logging_steps": 10}, two_rewards),
    Script(
        "deepspeed_config",
        {"deepspeed": "ds_zero3.json", "bf16": True, "ds3_gather_for_generation": False, "ddp_timeout": 7200},
    ),
    Script(
        "accelerate_launch_eight",
        {"bf16": True, "ddp_find_unused_parameters": False},
        refused=("RaftTrainer",),
        environment={"WORLD_SIZE": "8", "LOCAL_RANK": "0", "RANK": "0"},
    ),
    Script(
        "conversational",
        {
            "chat_template_kwargs": {"enable_thinking": False},
            "remove_unused_columns": False,
            "dataloader_num_workers": 4,
        },
        lambda: {
            "train_dataset": CHAT,
            "reward_funcs": length_of_message,
            "processing_class": tiny_tokenizer(chat=True),
        },
        trains=True,
    ),
    Script(
        "best_model_at_end",
        {"eval_strategy": "steps", "eval_steps": 50, "per_device_eval_batch_size": 8, "save_strategy": "steps"}
        | {
            "save_steps": 50,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_reward",
        },
        lambda: {"eval_dataset": ROWS[:4], "callbacks": [EarlyStoppingCallback(early_stopping_patience=3)]},
        trains=True,
    ),
    Script(
        "no_tools",
        {"log_completions": True, "num_completions_to_print": 2, "log_unique_prompts": True},
        lambda: {"tools": None, "rollout_func": None, "environment_factory": None, "optimizers": (None, None)},
    ),
    Script(
        "agent_with_tools",
        {"max_tool_calling_iterations": 3},
        lambda: {"tools": [tool], "rollout_func": num_unique_chars},
        refused=("tools", "rollout_func"),
    ),
    Script(
        "trl_script",
        {"learning_rate": 1e-5, "num_train_epochs": 1, "per_device_train_batch_size": 4, "use_vllm": True}
        | {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "logging_steps": 5},
        parse="flags",
    ),
    Script(
        "moving_reference",
        {"beta": 0.04, "sync_ref_model": True, "ref_model_mixup_alpha": 0.9, "ref_model_sync_steps": 64},
        refused=("sync_ref_model",),
    ),
    Script(
        "sampling",
        {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.05, "repetition_penalty": 1.1, "num_iterations": 2}
        | {"beta": 0.04, "generation_kwargs": None, "shuffle_dataset": True},
        trains=True,
    ),
    Script(
        "entropy",
        {"top_entropy_quantile": 0.2, "entropy_coef": 0.001, "shuffle_dataset": False, "epsilon_high": 0.28},
        refused=("top_entropy_quantile", "entropy_coef", "shuffle_dataset"),
    ),
    Script(
        "performance",
        {"use_liger_kernel": True, "torch_compile": True, "dataloader_num_workers": 2, "dataloader_pin_memory": True}
        | {"use_transformers_continuous_batching": True, "fsdp": "", "auto_find_batch_size": False, "tf32": None},
    ),
    Script(
        "reward_model",
        {"per_device_train_batch_size": 2, "num_generations": 2, "save_strategy": "no", "warmup_steps": 10},
        lambda: {"reward_funcs": reward_model(), "reward_processing_classes": tiny_tokenizer()},
        trains=True,
    ),
)


def arguments_of(script: Script, config_class: Any, folder: Path, overlay: dict[str, Any]) -> Any:
    """The configuration as the script makes it: by the constructor, a YAML file, or flags."""
    added = {"output_dir": str(folder / "run"), "use_cpu": True}
    if "deepspeed" in script.config:
        (folder / "ds_zero3.json").write_text(
            json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}})
        )
        added["deepspeed"] = str(folder / "ds_zero3.json")
    given = {**script.config, **added}
    if script.parse == "yaml":
        import yaml

        (folder / "config.yaml").write_text(yaml.safe_dump(given | {"run_config": overlay}))
        (args,) = TrlParser((config_class,)).parse_args_and_config(["--config", str(folder / "config.yaml")])
        return args
    if script.parse == "flags":
        flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        flags += ["--run_config", json.dumps(overlay), "--model_name_or_path", "m", "--dataset_name", "d"]
        parser = HfArgumentParser((ScriptArguments, config_class, ModelConfig))
        return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)[1]
    return config_class(**given, run_config=overlay)


def trainer_of(script: Script, config_class: Any, trainer_class: Any, folder: Path, overlay: dict[str, Any]) -> Any:
    """The trainer that the script makes."""
    defaults = {"reward_funcs": num_unique_chars, "train_dataset": ROWS, "processing_class": tiny_tokenizer()}
    given = {"model": tiny_llama(), **defaults, **script.trainer()}
    return trainer_class(args=arguments_of(script, config_class, folder, overlay), **given)
