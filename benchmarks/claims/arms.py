"""The arms: every run that a claim needs, each once, and how one is run and evaluated."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from side_by_side import THREADS

NOISE = str(Path(__file__).with_name("noise.py"))
SFT_PAIRS, STUDENT_STEPS = 1024, 600


@dataclass(frozen=True)
class Sizes:
    """What fixes the cost of an arm."""

    rounds: int = 6
    prompts: int = 64
    held_out: int = 256
    draws: int = 2

    @property
    def folder(self) -> str:
        """Where runs of these sizes lie: others must not be mixed with them."""
        return f"{self.rounds}-rounds-of-{self.prompts}-judged-on-{self.held_out}x{self.draws}"


@dataclass(frozen=True)
class Arm:
    """One way to train; `changes` go over the settings that all share, `rounds` is False where nothing is trained.

    origin: the model that it starts from (starter, sft, student), to which its KL is measured unless that is sft: then
    to the starter. after: the arms whose models it needs.
    """

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "starter"
    rounds: bool = True
    after: tuple[str, ...] = ()


def k_of(k: int) -> Arm:
    return Arm(f"k{k}", f"K = {k}", {"sampling": {"num_generations": k}})


def noisy(level: float, sigma: float) -> Arm:
    """The reward with noise of `level` standard deviations of its own over the start's completions, in its chunks."""
    spec = {"spec": f"{NOISE}:noise", "options": {"sigma": sigma}}
    return Arm(f"noise{level:g}", f"noise {level:g} sd", {"rewards": {"reward_funcs": ["starter", spec]}})


BASE, RANDOM = "k8", "random"
REWARD_SD = 3.1  # of the starter's reward over the starter's completions
ARMS = {
    arm.name: arm
    for arm in (
        Arm("start", "start", rounds=False),
        Arm("sft", "SFT", origin="sft", rounds=False),
        Arm("sft-raft", "SFT, then RAFT", origin="sft", after=("sft",)),
        *(k_of(k) for k in (32, 16, 8, 4, 2, 1)),
        Arm("t0.85", "λ = 0.85", {"sampling": {"temperature": 0.85}}),
        Arm("t0.7", "λ = 0.7", {"sampling": {"temperature": 0.7}}),
        *(Arm(f"beta{b:g}", f"β = {b:g}", {"selection": {"beta": b}}) for b in (0.1, 0.3, 1.0)),
        Arm("global", "global", {"selection": {"rule": "top_fraction", "keep_fraction": 0.125}}),
        *(noisy(level, level * REWARD_SD) for level in (0.5, 1.0, 2.0)),
        Arm(RANDOM, "random", {"selection": {"rule": "random"}}),
        Arm("student", "student", origin="student", rounds=False),
        Arm("student-own", "its own samples", origin="student"),
        Arm("student-taught", "with a teacher's", {"sampling": {"num_generations": 1}}, "student", after=(BASE,)),
    )
}


def settings(arm: Arm, seed: int, sizes: Sizes, out: Path) -> dict[str, Any]:
    """The configuration of the arm's run; nothing is evaluated on the way."""
    from raftune.config.load import merge

    shared: dict[str, Any] = {
        "name": f"{arm.name}-{seed}",
        "output_dir": str(out / "runs" / f"{arm.name}-{seed}"),
        "seed": seed,
        "num_rounds": sizes.rounds,
        "prompts_per_round": sizes.prompts,
        "keep_models": "last",
        "data": {"prompts": "starter"},
        "policy": {"model": str(origin_model(arm.origin, seed, out))},
        "sampling": {"num_generations": 8, "max_completion_length": 64},
        "rewards": {"reward_funcs": ["starter"]},
        "training": {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 16},
        "evaluation": {"num_prompts": 0, "kl": False},
        "engine": {"threads": THREADS},
    }
    changes = dict(arm.changes)
    if arm.name == "student-taught":  # as many candidates as the others: one of its own, seven of the teacher's
        teacher = {"model": str(last_model(ARMS[BASE], seed, sizes, out)), "num_generations": 7}
        changes["sampling"] = {**changes["sampling"], "teacher": teacher}
    config = merge([shared, changes])
    for spec in config["rewards"]["reward_funcs"]:
        if isinstance(spec, dict):
            spec["options"] = {**spec["options"], "seed": seed}
    return config


def judging(arm: Arm, seed: int, sizes: Sizes, out: Path) -> dict[str, Any]:
    """How every arm is judged, alike: at temperature 1, on held-out prompts, by the reward without noise."""
    return {
        "name": f"{arm.name}-{seed}",
        "output_dir": str(out / "judged" / f"{arm.name}-{seed}"),
        "data": {"prompts": "starter"},
        "policy": {"model": str(last_model(arm, seed, sizes, out))},
        "sampling": {"max_completion_length": 64},
        "rewards": {"reward_funcs": ["starter"]},
        "evaluation": {
            "prompts": "starter",
            "num_prompts": sizes.held_out,
            "num_generations": sizes.draws,
            "seed": seed,
            "reward_funcs": ["starter:judge"],
            "kl": False,
        },
        "engine": {"threads": THREADS},
    }


def origin_model(origin: str, seed: int, out: Path) -> str | Path:
    """What a run starts from: the bundled starter, that one after SFT, or a smaller student."""
    places = {"starter": "starter", "sft": out / "sft" / str(seed) / "model", "student": out.parent / "student"}
    return places[origin]


def last_model(arm: Arm, seed: int, sizes: Sizes, out: Path) -> str | Path:
    """The model that is judged: of the last round, not of the best one, so that no maximum is taken over noise."""
    if not arm.rounds:
        return origin_model(arm.origin, seed, out)
    return out / "runs" / f"{arm.name}-{seed}" / f"round-{sizes.rounds:04d}" / "model"


def result_file(arm: Arm, seed: int, out: Path) -> Path:
    return out / "results" / f"{arm.name}-{seed}.json"


def run_arm(arm: Arm, seed: int, sizes: Sizes, out: Path) -> None:
    """Trains and judges one arm, and writes its numbers; continues what an earlier call began."""
    from raftune.runtime.run import run

    began = time.process_time()
    if arm.origin == "sft":
        fine_tune(seed, out)
    if arm.rounds:
        run(settings(arm, seed, sizes, out))
    found = {"arm": arm.name, "seed": seed, **numbers(judging(arm, seed, sizes, out), reference(arm, seed, out))}
    found |= history(out / "runs" / f"{arm.name}-{seed}", sizes) if arm.rounds else {}
    path = result_file(arm, seed, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | {"cpu_seconds": round(time.process_time() - began, 1)}, indent=1) + "\n")


def reference(arm: Arm, seed: int, out: Path) -> str | Path:
    """The model that the KL is measured to."""
    return origin_model("starter" if arm.origin == "sft" else arm.origin, seed, out)


def numbers(config: dict[str, Any], reference: str | Path) -> dict[str, float]:
    """Reward, judge, KL, diversity and length of a model, by the evaluation that any run has at its start."""
    from raftune.config.load import validate
    from raftune.engines.run_stage import run_stage
    from raftune.evaluation.history import metrics_of
    from raftune.runtime.assembly import Runtime
    from raftune.store.run import RunFolder

    root = RunFolder(config["output_dir"])
    with root.lock():
        assembly = Runtime(root, validate(config))
        try:
            for stage in assembly.stages(0):
                run_stage(assembly, stage, 0, lambda kind, **facts: None)
            metrics = metrics_of(root, 0)
            kl = divergence(assembly, reference)
        finally:
            assembly.close()
    return {
        "reward": metrics["reward"]["mean"],
        "judge": metrics["held_out"]["mean"],
        "kl": kl,
        "distinct_2": plain(metrics["distinct_2"]),
        "msttr_100": plain(metrics["msttr_100"]),
        "length": metrics["completions/mean_length"]["mean"],
    }


def plain(value: Any) -> float:
    """A number that may come with an interval."""
    return float(value["mean"] if isinstance(value, dict) else value)


def divergence(assembly: Any, reference: str | Path) -> float:
    """Nats per completion: the mean of log p - log p0 over the evaluated completions, p0 the reference."""
    import numpy as np
    import pyarrow as pa

    from raftune.stages.plan import prompts_of_samples
    from raftune.store.layout import chunk_file, chunk_numbers
    from raftune.store.parquet import read_table

    run = assembly.run
    ratios = []
    plan, samples_folder = run.folder(0, "evaluate/plan"), run.folder(0, "evaluate/generate")
    ours, theirs = assembly.policies.at(run.folder(0, "model")), load(assembly, reference)
    for chunk in chunk_numbers(samples_folder):
        samples: pa.Table = read_table(samples_folder / chunk_file(chunk))
        prompts = prompts_of_samples(plan, chunk, samples)
        ratios.append(ours.recorded_log_probs(samples) - theirs.log_probs(prompts, samples, 128))
    return max(0.0, float(np.concatenate(ratios).mean()))  # of a model to itself it is 0 but for rounding


def load(assembly: Any, model: str | Path) -> Any:
    """Another model as a policy."""
    from raftune.starters.resolve import resolve_starters

    policy = assembly.config.policy.model_copy(update={"model": str(model)})
    config = resolve_starters(assembly.config.model_copy(update={"policy": policy}))
    folder = assembly.run.root / "reference"
    folder.mkdir(exist_ok=True)
    assembly.family.start(config, folder)
    return assembly.family.load(config, folder, folder)


def history(root: Path, sizes: Sizes) -> dict[str, Any]:
    """What the selections kept: the reward of round 1's winners; the share of prompts without kept samples, and which.

    empty_by_domain: of each domain of the generator, how many prompts had no kept samples, and how many there were.
    """
    from raftune.starters.text.corpus import read_request
    from raftune.store.parquet import read_table

    prompts_by_domain, empty_prompts, examples = Counter[str](), Counter[str](), []
    first = None
    for number in range(1, sizes.rounds + 1):
        folder = root / f"round-{number:04d}"
        summary = json.loads((folder / "select" / "summary.json").read_text())
        first = summary["reward_kept"] if first is None else first
        for row in read_table(folder / "plan" / "prompts.parquet", ["prompt_id", "prompt"]).to_pylist():
            request = read_request(row["prompt"])
            assert request is not None, row["prompt"]
            prompts_by_domain[request.domain] += 1
            if row["prompt_id"] in summary["empty_prompts"]:
                empty_prompts[request.domain] += 1
                examples.append(request.text)
    by_domain = {domain: [empty_prompts[domain], prompts_by_domain[domain]] for domain in sorted(prompts_by_domain)}
    share = empty_prompts.total() / prompts_by_domain.total()
    return {"initial_best": first, "empty": share, "empty_by_domain": by_domain, "empty_prompts": examples[:3]}


# -- the models to begin from ------------------------------------------------------------------------------------------


def fine_tune(seed: int, out: Path) -> None:
    """The starter after one epoch on the preferred completions of the generator's preferences."""
    from raftune.config.load import validate_as
    from raftune.config.sft import SftConfig
    from raftune.sft import sft
    from raftune.starters.text.preferences import preferences, write_lines

    rows = out / "sft" / f"preferences-{seed}.jsonl"
    if not rows.is_file():
        rows.parent.mkdir(parents=True, exist_ok=True)
        write_lines(preferences("train", SFT_PAIRS, seed), rows)
    config = {
        "output_dir": str(out / "sft" / str(seed)),
        "seed": seed,
        "threads": THREADS,
        "data": {"path": str(rows)},
        "policy": {"model": "starter"},
        "training": {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 16},
    }
    sft(validate_as(SftConfig, config))


def make_student(out: Path) -> None:
    """A Llama of a fifth of the starter's size, trained on the same corpus for under a minute, with its tokenizer."""
    folder = out / "student"
    if (folder / "model.safetensors").is_file():
        return
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    sys.path.insert(0, str(Path(__file__).parents[2]))  # tools/ is no part of the package
    from raftune.starters.text import policy_path
    from tools.starters.optimizer import Optimizer
    from tools.starters.text.build import TYPICAL_LENGTH, dialogue_batches
    from tools.starters.text.training import llama_config, pad_right, save

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(policy_path())
    student = LlamaForCausalLM(llama_config(tokenizer, hidden_size=64, num_hidden_layers=2, intermediate_size=176))
    with contextlib.redirect_stdout(io.StringIO()):
        descent = Optimizer("student", student, 4e-3, STUDENT_STEPS)
        for _, rows in zip(range(STUDENT_STEPS), batches(dialogue_batches, tokenizer), strict=False):
            ids_BT = pad_right([row.ids for row in rows], tokenizer.pad_token_id)
            labels_BT = pad_right([[-100] * row.prompt_length + row.ids[row.prompt_length :] for row in rows], -100)
            loss = student(input_ids=ids_BT, labels=labels_BT, num_items_in_batch=len(rows) * TYPICAL_LENGTH).loss
            descent.advance(loss)
    save(student, tokenizer, folder)
    print(f"student: {student.num_parameters():,} parameters", file=sys.stderr, flush=True)


def batches(dialogue_batches: Any, tokenizer: Any) -> Any:
    from random import Random

    return dialogue_batches(tokenizer, 48, Random(0), None)
