"""Arguments of other trainers: ignored, warned of or refused.

The rule for all of them: would the trained model differ from what the user expects?

    quiet     speed, place or frequency, which a run decides by itself: accepted
    without   a part of GRPO's estimate or of an engine that RAFT does not have: accepted with one warning
    refused   it would change the trained model, and this package cannot do it: ConfigError, all in one message

Arguments with an equivalent are mapped (`config.py`). With `strict=False` refusals become warnings.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import HfArgumentParser

# Arguments of GRPOConfig, of the present and of earlier versions, that are none of TrainingArguments: type and default.
# RaftConfig has them as fields, so that files and command lines may hold them.
BORROWED: dict[str, tuple[Any, Any]] = {
    "num_iterations": (int, 1),
    "epsilon": (float, 0.2),
    "epsilon_high": (float | None, None),
    "delta": (float | None, None),
    "importance_sampling_level": (str, "token"),
    "off_policy_mask_threshold": (float | None, None),
    "use_bias_correction_kl": (bool, True),
    "sapo_temperature_neg": (float, 1.05),
    "sapo_temperature_pos": (float, 1.0),
    "vespo_k_pos": (float, 2.0),
    "vespo_lambda_pos": (float, 3.0),
    "vespo_k_neg": (float, 3.0),
    "vespo_lambda_neg": (float, 2.0),
    "loss_type": (str, "dapo"),
    "scale_rewards": (str, "group"),
    "multi_objective_aggregation": (str, "sum_then_normalize"),
    "sync_ref_model": (bool, False),
    "ref_model_mixup_alpha": (float, 0.6),
    "ref_model_sync_steps": (int, 512),
    "top_entropy_quantile": (float, 1.0),
    "entropy_coef": (float, 0.0),
    "use_adaptive_entropy": (bool, False),
    "entropy_coef_min": (float, 0.0),
    "entropy_coef_max": (float, 1.0),
    "entropy_coef_delta": (float, 0.005),
    "entropy_target": (float, 0.2),
    "generation_batch_size": (int | None, None),
    "steps_per_generation": (int | None, None),
    "shuffle_dataset": (bool | None, True),
    "max_prompt_length": (int | None, None),
    "pad_to_multiple_of": (int | str | None, "auto"),
    "disable_dropout": (bool, False),
    "cast_lm_head_to_fp32": (bool, False),
    "router_aux_loss_coef": (float | None, None),
    "ds3_gather_for_generation": (bool, True),
    "cache_implementation": (str | None, None),
    "use_transformers_paged": (bool, False),
    "use_transformers_continuous_batching": (bool, False),
    "transformers_continuous_batching_config": (dict[str, Any] | str | None, None),
    "max_tool_calling_iterations": (int | None, None),
    "log_multimodal": (bool, True),
    "log_unique_prompts": (bool, False),
    "wandb_log_unique_prompts": (bool, False),
    "log_completions_hub_repo": (str | None, None),
    "use_vllm": (bool, False),
    "vllm_mode": (str, "colocate"),
    "vllm_model_impl": (str, "vllm"),
    "vllm_enable_sleep_mode": (bool, False),
    "vllm_structured_outputs_regex": (str | None, None),
    "vllm_guided_decoding_regex": (str | None, None),
    "vllm_server_base_url": (str | None, None),
    "vllm_server_host": (str, "0.0.0.0"),
    "vllm_server_port": (int, 8000),
    "vllm_server_timeout": (float, 240.0),
    "vllm_group_port": (int, 51216),
    "vllm_gpu_memory_utilization": (float, 0.3),
    "vllm_max_model_length": (int | None, None),
    "vllm_max_model_len": (int | None, None),
    "vllm_tensor_parallel_size": (int, 1),
    "vllm_importance_sampling_correction": (bool, True),
    "vllm_importance_sampling_mode": (str, "sequence_mask"),
    "vllm_importance_sampling_clip_max": (float | None, 3.0),
    "vllm_importance_sampling_clip_min": (float | None, None),
    "vllm_importance_sampling_cap": (float | None, None),
    "vllm_device": (str | None, None),
    "vllm_dtype": (str | None, None),
    "vllm_enable_prefix_caching": (bool | None, None),
    "use_liger_loss": (bool, False),
    "dataset_num_proc": (int | None, None),
    # of transformers before version 5
    "warmup_ratio": (float | None, None),
    "logging_dir": (str | None, None),
    "evaluation_strategy": (str | None, None),
    "overwrite_output_dir": (bool, False),
    "save_safetensors": (bool, True),
    "group_by_length": (bool, False),
    "no_cuda": (bool, False),
    "include_tokens_per_second": (bool, False),
    "use_legacy_prediction_loop": (bool, False),
}
# Of these a run reads what `config.py` maps.
MAPPED = ("num_iterations", "max_prompt_length", "warmup_ratio", "no_cuda", "save_total_limit")

_RATIO = "RAFT fine-tunes on the best of the K completions, so there is no policy ratio and no clipping"
_ADVANTAGE = "RAFT ranks the K completions of a prompt, so there are no advantages to scale"
_VLLM = "there is no vLLM engine: raftune's own sampler generates, and shares each prompt's cache"
_ONE_DEVICE = "the run is one process on one device, with all of the model on it"
_ROUND_SIZE = "a round's size is prompts_per_round and num_generations"
_NO_REFERENCE = "no reference model moves along; beta measures the distance to the start model"
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
    "scale_rewards": _ADVANTAGE,
    **dict.fromkeys(("generation_batch_size", "steps_per_generation"), _ROUND_SIZE),
    "use_vllm": _VLLM,
    **dict.fromkeys(("use_liger_kernel", "use_liger_loss"), "the loss reads the head at completion positions only"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "models run uncompiled"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _ONE_DEVICE),
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
    "sync_ref_model": _NO_REFERENCE,
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
# What TrainingArguments would act on, or stumble over, by itself.
KEPT_FROM_TRANSFORMERS = (
    *("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "load_best_model_at_end"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "dataloader_prefetch_factor"),
    *("fp16_full_eval", "bf16_full_eval", "ddp_backend", "ddp_timeout"),
)

BorrowedArguments = dataclasses.make_dataclass(
    "BorrowedArguments",
    [
        (name, kind, dataclasses.field(default=default, metadata={"help": f"Of GRPOConfig: {why}."}))
        for name, (kind, default) in BORROWED.items()
        for why in (WITHOUT.get(name) or REFUSED.get(name) or ("mapped" if name in MAPPED else "changes nothing here"),)
    ],
)


def unknown(given: Iterable[str], known: Iterable[str]) -> list[str]:
    """A line for each name that is no argument at all; hints lead to arguments that have an effect."""
    names = list(known)
    found = []
    for name in given:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else "delete it, or put a field of RunConfig into run_config."
        found.append(f"{name} is not an argument of RaftConfig; {hint}")
    return found


def unread(args: Any, base: type[Any], read: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """What was set though no run reads it: a line for each argument that is refused, and those to warn of by reason."""
    refused: list[str] = []
    without: dict[str, list[str]] = {}
    defaults = ArgumentDefaults(args, base)
    passed_over = {*read, *QUIET}
    for name in (field.name for owner in (BorrowedArguments, base) for field in dataclasses.fields(owner)):
        value, depends = getattr(args, name), ONLY_WITH.get(name)
        nothing = name in passed_over or (depends and not getattr(args, depends)) or defaults.has(name, value)
        if nothing or _among(value, NEUTRAL.get(name, ())):
            continue
        if name in REFUSED:
            refused.append(
                f"{name} must stay at {default_of(type(args), name)!r}; got {value!r}: {REFUSED[name]}. Delete it."
            )
        else:
            without.setdefault(WITHOUT.get(name, "a run does not read it"), []).append(name)
    return refused, without


def warning_of(without: Mapping[str, list[str]]) -> str:
    """The one warning about arguments that have no part in a run."""
    lines = [f"  {', '.join(names)}: {why}" for why, names in without.items()]
    return "\n".join(["These arguments have no part in a RAFT run, which goes on without them:", *lines])


class ArgumentDefaults:
    """Every form that an argument has where nobody set it: the class's, what TrainingArguments makes of it, and what a
    parser of command lines hands on."""

    def __init__(self, args: Any, base: type[Any]) -> None:
        self.args, self.base = args, base
        self._others: list[Mapping[str, Any]] | None = None

    def has(self, name: str, value: Any) -> bool:
        if value == default_of(type(self.args), name):
            return True
        if self._others is None:
            settled = self.base(output_dir="unused", use_cpu=self.args.use_cpu)
            parsed = HfArgumentParser((BorrowedArguments, self.base)).parse_known_args([])[0]
            self._others = [vars(settled), vars(parsed)]
        return any(name in other and value == other[name] for other in self._others)


def default_of(owner: type[Any], name: str) -> Any:
    """The default of a dataclass's field."""
    field = next(f for f in dataclasses.fields(owner) if f.name == name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _among(value: Any, held: tuple[Any, ...]) -> bool:
    return any(value is one or (value == one and isinstance(value, bool) == isinstance(one, bool)) for one in held)
