"""Arguments of other trainers: ignored, warned of or refused.

The rule for all of them: would the trained model differ from what the user expects?

    quiet     speed, place or frequency, which a run decides by itself: accepted
    without   a part of GRPO's estimate or of an engine that RAFT does not have: accepted with one warning
    refused   it would change the trained model, and this package cannot do it: ConfigError, all in one message

Arguments with an equivalent are mapped (`config.py`). With `strict=False` refusals become warnings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from transformers import HfArgumentParser

from raftune.sanitize import did_you_mean

# Arguments of GRPOConfig, of all its versions, and of transformers before version 5 that TrainingArguments lacks: type
# and default. RaftConfig has them as fields, so that files and command lines may hold them.
BORROWED: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("sync_ref_model", "use_adaptive_entropy", "disable_dropout", "no_cuda"), (bool, False)),
    **dict.fromkeys(("cast_lm_head_to_fp32", "log_unique_prompts", "wandb_log_unique_prompts"), (bool, False)),
    **dict.fromkeys(("use_vllm", "vllm_enable_sleep_mode", "use_transformers_paged"), (bool, False)),
    **dict.fromkeys(("use_transformers_continuous_batching", "use_liger_loss", "group_by_length"), (bool, False)),
    **dict.fromkeys(("overwrite_output_dir", "use_legacy_prediction_loop"), (bool, False)),
    "include_tokens_per_second": (bool, False),
    **dict.fromkeys(("use_bias_correction_kl", "ds3_gather_for_generation", "log_multimodal"), (bool, True)),
    **dict.fromkeys(("vllm_importance_sampling_correction", "save_safetensors"), (bool, True)),
    "shuffle_dataset": (bool | None, True),
    "vllm_enable_prefix_caching": (bool | None, None),
    **dict.fromkeys(("generation_batch_size", "steps_per_generation", "max_prompt_length"), (int | None, None)),
    **dict.fromkeys(("vllm_max_model_length", "vllm_max_model_len", "dataset_num_proc"), (int | None, None)),
    "max_tool_calling_iterations": (int | None, None),
    **dict.fromkeys(("epsilon_high", "delta", "off_policy_mask_threshold", "warmup_ratio"), (float | None, None)),
    **dict.fromkeys(("vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap"), (float | None, None)),
    "router_aux_loss_coef": (float | None, None),
    **dict.fromkeys(("cache_implementation", "log_completions_hub_repo", "logging_dir"), (str | None, None)),
    **dict.fromkeys(("vllm_structured_outputs_regex", "vllm_guided_decoding_regex"), (str | None, None)),
    **dict.fromkeys(("vllm_server_base_url", "vllm_device", "vllm_dtype"), (str | None, None)),
    "evaluation_strategy": (str | None, None),
    "num_iterations": (int, 1),
    "ref_model_sync_steps": (int, 512),
    "vllm_server_port": (int, 8000),
    "vllm_group_port": (int, 51216),
    "vllm_tensor_parallel_size": (int, 1),
    "epsilon": (float, 0.2),
    "sapo_temperature_neg": (float, 1.05),
    "sapo_temperature_pos": (float, 1.0),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_neg"), (float, 2.0)),
    **dict.fromkeys(("vespo_k_neg", "vespo_lambda_pos"), (float, 3.0)),
    "ref_model_mixup_alpha": (float, 0.6),
    **dict.fromkeys(("top_entropy_quantile", "entropy_coef_max"), (float, 1.0)),
    **dict.fromkeys(("entropy_coef", "entropy_coef_min"), (float, 0.0)),
    "entropy_coef_delta": (float, 0.005),
    "entropy_target": (float, 0.2),
    "vllm_server_timeout": (float, 240.0),
    "vllm_gpu_memory_utilization": (float, 0.3),
    "vllm_importance_sampling_clip_max": (float | None, 3.0),
    "importance_sampling_level": (str, "token"),
    "loss_type": (str, "dapo"),
    "scale_rewards": (str, "group"),
    "multi_objective_aggregation": (str, "sum_then_normalize"),
    "vllm_mode": (str, "colocate"),
    "vllm_model_impl": (str, "vllm"),
    "vllm_server_host": (str, "0.0.0.0"),
    "vllm_importance_sampling_mode": (str, "sequence_mask"),
    "pad_to_multiple_of": (int | str | None, "auto"),
    "transformers_continuous_batching_config": (dict[str, Any] | str | None, None),
}
# Of these a run reads what `config.py` maps.
MAPPED = ("num_iterations", "max_prompt_length", "warmup_ratio", "no_cuda", "save_total_limit")

_RATIO = "RAFT fine-tunes on the best of the K completions, so there is no policy ratio and no clipping"
_OWN_PROCESSES = "the script is one process; `processes` and `parallel` say how it trains on several GPUs"
_ROUND_SIZE = "a round's size is prompts_per_round and num_generations"
_NO_ENTROPY = "the loss has no entropy term; a higher temperature gives more variety among the K completions"
_NO_REGEX = "completions cannot be constrained; give the format as a reward, such as the built-in `regex`"

# Accepted with one warning: the argument asks for a part, or for speed, that there is not.
WITHOUT: dict[str, str] = {
    **dict.fromkeys(("epsilon", "epsilon_high", "delta", "importance_sampling_level"), _RATIO),
    **dict.fromkeys(("off_policy_mask_threshold", "use_bias_correction_kl"), _RATIO),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _RATIO),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), _RATIO),
    "loss_type": "the loss is the likelihood of what was kept; run_config={'training.loss_normalization': …} says what "
    "its mean is over",
    "scale_rewards": "RAFT ranks the K completions of a prompt, so there are no advantages to scale",
    **dict.fromkeys(("generation_batch_size", "steps_per_generation"), _ROUND_SIZE),
    "use_vllm": "vLLM generates where it is installed and a GPU is there; to demand it, "
    "run_config={'sampling.backend': 'vllm'}",
    **dict.fromkeys(("use_liger_kernel", "use_liger_loss"), "the loss reads the head at completion positions only"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "models run uncompiled"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _OWN_PROCESSES),
    "debug": "a round's training has no such instruments",
    "full_determinism": "runs are bit-identical on a CPU; for CUDA call torch.use_deterministic_algorithms(True)",
    "log_completions_hub_repo": "all samples lie as Parquet in the run; `raftune export` makes data sets of them",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR says where TensorBoard's files go",
    "overwrite_output_dir": "a run in output_dir is resumed, or refused with the difference; nothing is overwritten",
    "hub_strategy": "the best round's model is pushed once, at the end",
}
# Accepted without a word: the same model comes of it, and the same files.
QUIET: tuple[str, ...] = (
    *("ref_model_mixup_alpha", "ref_model_sync_steps"),  # of sync_ref_model
    *("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),  # of use_adaptive_entropy
    *(name for name in BORROWED if name.startswith("vllm_") and not name.endswith("_regex")),  # of use_vllm
    *("pad_to_multiple_of", "cast_lm_head_to_fp32", "ds3_gather_for_generation", "cache_implementation"),
    *("use_transformers_paged", "use_transformers_continuous_batching", "transformers_continuous_batching_config"),
    *("max_tool_calling_iterations", "log_multimodal", "log_unique_prompts", "wandb_log_unique_prompts"),
    *("dataset_num_proc", "evaluation_strategy", "save_safetensors", "group_by_length", "include_tokens_per_second"),
    *("use_legacy_prediction_loop", "remove_unused_columns", "label_smoothing_factor", "use_cache", "label_names"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    *("save_strategy", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
    *("ignore_data_skip", "restore_callback_states_from_checkpoint", "auto_find_batch_size", "accelerator_config"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("ddp_timeout", "local_rank", "average_tokens_across_devices", "log_on_each_node", "log_level_replica"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    *("train_sampling_strategy", "length_column_name", "data_seed", "liger_kernel_config"),
    *("include_num_input_tokens_seen", "hub_always_push", "skip_memory_metrics", "logging_nan_inf_filter"),
    *("do_train", "do_eval", "do_predict", "load_best_model_at_end"),
)
# Refused: another model would come of it than was asked for.
REFUSED: dict[str, str] = {
    "multi_objective_aggregation": "rewards are added up as they are; run_config={'rewards.combine': 'rank'} adds up "
    "ranks, which no reward's scale dominates",
    "sync_ref_model": "no reference model moves along; beta measures the distance to the start model",
    "top_entropy_quantile": "every token of a kept completion is learned",
    **dict.fromkeys(("entropy_coef", "use_adaptive_entropy"), _NO_ENTROPY),
    **dict.fromkeys(("vllm_structured_outputs_regex", "vllm_guided_decoding_regex"), _NO_REGEX),
    "shuffle_dataset": "prompts come in an order that derives from seed, without replacement",
    "disable_dropout": "dropout is the model's own; set it to 0 in the model's configuration",
    "router_aux_loss_coef": "the loss is the likelihood of what was kept, without auxiliary terms",
    "greater_is_better": "a higher reward is better; give a penalty a reward_weights entry below 0",
}
# Values that ask for nothing, beside an argument's default.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "shuffle_dataset": (None,),
    "scale_rewards": (True, "True", "true"),
    "greater_is_better": (True,),
    "router_aux_loss_coef": (0.0,),
    "hub_strategy": ("end",),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "debug"), ("", [], {})),
    "multi_objective_aggregation": (None,),
}
# An argument that means nothing unless the other is set.
ONLY_WITH = {
    "sync_ref_model": "beta",
    "vllm_structured_outputs_regex": "use_vllm",
    "vllm_guided_decoding_regex": "use_vllm",
    "greater_is_better": "metric_for_best_model",
    "hub_strategy": "push_to_hub",
}

BorrowedArguments = dataclasses.make_dataclass(
    "BorrowedArguments",
    [
        (name, kind, dataclasses.field(default=default, metadata={"help": f"Of GRPOConfig: {reason}."}))
        for name, (kind, default) in BORROWED.items()
        for reason in (
            WITHOUT.get(name) or REFUSED.get(name) or ("mapped" if name in MAPPED else "changes nothing here"),
        )
    ],
)


def unknown(names: Iterable[str], arguments: Iterable[str]) -> list[str]:
    """A line for each name that is no argument at all; hints lead to arguments that have an effect."""
    arguments, otherwise = list(arguments), "delete it, or put a field of RunConfig into run_config."
    return [f"{name} is not an argument of RaftConfig; {did_you_mean(name, arguments, otherwise)}" for name in names]


def unread(args: Any, base: type[Any], read: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Arguments that were set though no run reads them: a line for each refused one, and by reason those to warn of."""
    refused: list[str] = []
    without: dict[str, list[str]] = {}
    defaults: list[Any] = []  # as TrainingArguments normalizes them, and as a parser of command lines gives them
    ignored = {*read, *QUIET}
    for name in (field.name for owner in (BorrowedArguments, base) for field in dataclasses.fields(owner)):
        value, default = getattr(args, name), default_of(type(args), name)
        if name in ignored or value == default or (name in ONLY_WITH and not getattr(args, ONLY_WITH[name])):
            continue
        if not defaults:
            parser = HfArgumentParser((BorrowedArguments, base))
            normalized = base(output_dir="unused", use_cpu=args.use_cpu)
            defaults = [vars(normalized), vars(parser.parse_known_args([])[0])]
        if any(name in others and value == others[name] for others in defaults):
            continue
        # 1 == True and 0.0 == False do not count
        if any(value == free and isinstance(value, bool) == isinstance(free, bool) for free in NEUTRAL.get(name, ())):
            continue
        if name in REFUSED:
            refused.append(f"{name} must stay at {default!r}; got {value!r}: {REFUSED[name]}. Delete it.")
        else:
            without.setdefault(WITHOUT.get(name, "a run does not read it"), []).append(name)
    return refused, without


def default_of(owner: type[Any], name: str) -> Any:
    """The default of a dataclass's field."""
    field = owner.__dataclass_fields__[name]
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
