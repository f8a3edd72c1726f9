"""What a script for another trainer may hold and RAFT has no use for: each with why, so that it can be deleted."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

_RATIO = "RAFT fine-tunes on the best of the K answers, so there is no policy ratio and no clipping"
_ADVANTAGE = "RAFT ranks the K answers of a prompt, so there are no advantages to scale"
_REFERENCE = "no reference model is trained along; `beta` penalises the distance to the start model when ranking"
_ENTROPY = "RAFT has no entropy term; raise `temperature` for more variety among the K answers"
_VLLM = "there is no vLLM engine: answers are drawn by raftune's own sampler, which shares each prompt's cache"
_GENERATE = "answers are drawn by raftune's own sampler; `generation_kwargs` takes the draw through `generate`"
_SCHEDULE = "every round draws anew; `prompts_per_round` and `num_generations` say how much"
_TOOLS = "the draw is one completion for each sample, without tools"
_ONE_PROCESS = "the run is one process on one device; `workers` draws and scores in several local processes"
_LOADER = "the kept rows lie in memory, and their order derives from `seed`"
_NO_EVAL_LOOP = "held-out prompts are drawn and scored after every round, no loss is evaluated"
_ROUND_SAVED = "every round's model is committed to the run; `keep_models` says which stay"
_RESUMES = "an interrupted run is continued by calling train() again, bit for bit"

# Arguments of TRL's configurations that are no field of RaftConfig.
FOREIGN: dict[str, str] = {
    **dict.fromkeys(("epsilon", "epsilon_high", "delta", "num_iterations", "importance_sampling_level"), _RATIO),
    **dict.fromkeys(("off_policy_mask_threshold", "use_bias_correction_kl", "top_entropy_quantile"), _RATIO),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _RATIO),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), _RATIO),
    "loss_type": "the loss is the likelihood of the kept answers; run_config={'tuning.loss_normalization': 'sample'} "
    "says what its mean is over",
    **dict.fromkeys(
        ("scale_rewards", "multi_objective_aggregation", "whiten_rewards", "normalize_advantage"), _ADVANTAGE
    ),
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "ref_model_init_kwargs"), _REFERENCE
    ),
    **dict.fromkeys(("kl_coef", "kl_estimator"), _REFERENCE),
    **dict.fromkeys(("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max"), _ENTROPY),
    **dict.fromkeys(("entropy_coef_delta", "entropy_target"), _ENTROPY),
    **dict.fromkeys(("num_ppo_epochs", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam"), _RATIO),
    **dict.fromkeys(("generation_batch_size", "steps_per_generation", "num_mini_batches", "total_episodes"), _SCHEDULE),
    **dict.fromkeys(("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode"), _VLLM),
    **dict.fromkeys(("vllm_structured_outputs_regex", "vllm_guided_decoding_regex", "vllm_server_base_url"), _VLLM),
    **dict.fromkeys(("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"), _VLLM),
    **dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"), _VLLM),
    **dict.fromkeys(("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"), _VLLM),
    **dict.fromkeys(("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"), _VLLM),
    "vllm_importance_sampling_cap": _VLLM,
    **dict.fromkeys(
        ("cache_implementation", "use_transformers_paged", "use_transformers_continuous_batching"), _GENERATE
    ),
    "transformers_continuous_batching_config": _GENERATE,
    "max_tool_calling_iterations": _TOOLS,
    "shuffle_dataset": "prompts are always drawn without replacement, in an order that derives from `seed`",
    "ds3_gather_for_generation": _ONE_PROCESS,
    "max_prompt_length": "prompts are never cut; run_config={'sampling.max_prompt_length': 512} refuses longer ones",
    "pad_to_multiple_of": "batches hold rows of like length, padded to the longest",
    "disable_dropout": "dropout is the model's own; set it to 0 in the model's configuration",
    "cast_lm_head_to_fp32": "logits are turned to float32 before anything is computed from them",
    "router_aux_loss_coef": "the loss is the likelihood of the kept answers, without auxiliary terms",
    "log_multimodal": "prompts are texts or messages",
    "log_unique_prompts": "with log_completions one answer of each prompt is shown",
    "log_completions_hub_repo": "all samples lie as Parquet in the run; `raftune export` makes data sets of them",
    "warmup_ratio": "write it as warmup_steps: a number below 1 is a share of the round's steps",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
}
# Where the value given is what holds anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_vllm", "sync_ref_model", "use_transformers_paged"), (False,)),
    **dict.fromkeys(("use_transformers_continuous_batching", "use_adaptive_entropy"), (False,)),
    "shuffle_dataset": (True, None),
    "max_prompt_length": (None,),
}
# Fields of TrainingArguments that a round does not read, and values of them that hold all the same.
HELD: dict[str, tuple[Any, ...]] = {
    "eval_strategy": ("epoch",),
    "save_strategy": ("epoch", "best"),
    "hub_strategy": ("end",),
    "train_sampling_strategy": ("group_by_length",),
    **dict.fromkeys(("load_best_model_at_end", "eval_on_start", "auto_find_batch_size", "greater_is_better"), (True,)),
    **dict.fromkeys(("do_train", "do_predict", "do_eval"), (True, False)),
    **dict.fromkeys(("remove_unused_columns", "logging_nan_inf_filter"), (False,)),
}
UNREAD: dict[str, str] = {
    "eval_strategy": "held-out prompts are evaluated after every round ('epoch'); num_eval_prompts=0 turns it off",
    **dict.fromkeys(("eval_steps", "eval_delay"), "held-out prompts are evaluated after every round"),
    "per_device_eval_batch_size": "held-out answers are drawn as the others: run_config={'sampling.batch_size': 256}",
    **dict.fromkeys(("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"), _NO_EVAL_LOOP),
    **dict.fromkeys(("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"), _NO_EVAL_LOOP),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "label_names"), _NO_EVAL_LOOP),
    "greater_is_better": "a higher reward is better; give a reward_weights entry below 0 to a penalty",
    **dict.fromkeys(("save_strategy", "save_only_model", "save_total_limit", "save_on_each_node"), _ROUND_SAVED),
    **dict.fromkeys(("enable_jit_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"), _RESUMES),
    **dict.fromkeys(("accelerator_config", "parallelism_config", "fsdp", "fsdp_config", "deepspeed"), _ONE_PROCESS),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), _ONE_PROCESS),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank"), _ONE_PROCESS),
    **dict.fromkeys(("average_tokens_across_devices", "log_on_each_node", "log_level_replica"), _ONE_PROCESS),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"), _LOADER),
    **dict.fromkeys(("dataloader_prefetch_factor", "dataloader_multiprocessing_context"), _LOADER),
    **dict.fromkeys(("dataloader_in_order", "train_sampling_strategy", "length_column_name", "data_seed"), _LOADER),
    "remove_unused_columns": "every column of the data reaches the rewards",
    "label_smoothing_factor": "the loss is the likelihood of the kept answers as they are",
    "use_liger_kernel": "the loss reads the head at completion positions only, which saves as much",
    "liger_kernel_config": "use_liger_kernel has no part in a round",
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"), "the fit runs the backbone as it is"
    ),
    "use_cache": "drawing always uses a cache, tuning never",
    "full_determinism": "runs are bit-identical on a CPU; for CUDA call torch.use_deterministic_algorithms(True)",
    "include_num_input_tokens_seen": "num_tokens is logged every round",
    "hub_strategy": "the best round's model is pushed once, at the end, which is 'end'",
    "hub_always_push": "the best round's model is pushed once, at the end",
    **dict.fromkeys(("debug", "skip_memory_metrics"), "the fit of a round has no such instruments"),
}


def strangers(given: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """A line for each name that is no argument of RaftConfig, unless its value is what holds anyway."""
    names = list(known)
    return [_stranger(name, names) for name, value in given.items() if not _among(value, HARMLESS.get(name, ()))]


def _stranger(name: str, names: list[str]) -> str:
    if name in FOREIGN:
        return f"{name} is not an argument of RaftConfig: {FOREIGN[name]}. Delete it."
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"{name} is not an argument of RaftConfig; " + (
        f"did you mean {near[0]!r}?" if near else "delete it, or put a field of RunConfig into run_config."
    )


def unread(args: Any, base: type[Any], read: Iterable[str]) -> list[str]:
    """A line for each field of `base` that was set to something that a run does not read."""
    ours = set(read)
    found = []
    settled = None
    for field in dataclasses.fields(base):
        value, default = getattr(args, field.name), default_of(type(args), field.name)
        if field.name in ours or value == default or _among(value, HELD.get(field.name, ())):
            continue
        settled = settled or base(output_dir=args.output_dir, use_cpu=args.use_cpu)
        if value == getattr(settled, field.name):  # what TrainingArguments makes of the default itself
            continue
        why = UNREAD.get(field.name, "a round does not read it")
        found.append(f"{field.name} must stay at {default!r}; got {value!r}: {why}. Delete it.")
    return found


def default_of(owner: type[Any], name: str) -> Any:
    """The default of a dataclass's field."""
    field = next(f for f in dataclasses.fields(owner) if f.name == name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _among(value: Any, held: tuple[Any, ...]) -> bool:
    return any(value is one or (value == one and isinstance(value, bool) == isinstance(one, bool)) for one in held)
