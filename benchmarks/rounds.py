"""Seconds per round and seconds to a given reward: raftune and TRL's GRPOTrainer, same model, prompts, K, reward.

    python benchmarks/rounds.py                     the whole comparison (about half an hour on two cores)
    python benchmarks/rounds.py --seeds 1 --rates 1e-3
    python benchmarks/rounds.py --overhead          what of a round is neither generating, reward nor training

Each run is a process of its own, so that memory is comparable; the two methods take turns. Both call the same reward
function, which records when it was called and its scores: a mark counts as reached when a whole step's samples of the
policy, in order, average at least that much. Importing and loading are not timed; nothing is evaluated on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROMPTS, K, LIMIT = 64, 8, 48
RATES = (3e-4, 1e-3, 3e-3)


class Diary:
    """The judge of the bundled starter, recording when it was called and its scores."""

    __name__ = "judge"

    def __init__(self, stop_at: float) -> None:
        self.stop_at, self.began, self.scores, self.times = stop_at, 0.0, [], []

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        from raftune.starters.text import judge

        values = [float(v) for v in judge(prompts=prompts, completions=completions)]
        self.scores += values
        self.times += [time.perf_counter() - self.began] * len(values)
        return values

    def steps(self) -> list[tuple[float, float]]:
        """(seconds, mean reward) of each whole step of PROMPTS x K samples."""
        size = PROMPTS * K
        whole = range(0, len(self.scores) - size + 1, size)
        return [(self.times[i + size - 1], statistics.fmean(self.scores[i : i + size])) for i in whole]

    @property
    def done(self) -> bool:
        steps = self.steps()
        return bool(steps) and steps[-1][1] >= self.stop_at


class ReachedError(Exception):
    """The last mark was reached: nothing more to measure."""


def grpo(rate: float, seed: int, steps: int, diary: Diary, folder: str) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from raftune.starters.text import policy_path, prompts

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            control.should_training_stop = diary.done

    torch.set_num_threads(os.cpu_count() or 1)
    config = GRPOConfig(
        output_dir=folder, learning_rate=rate, seed=seed, max_steps=steps, num_generations=K,
        max_completion_length=LIMIT,
        per_device_train_batch_size=64, gradient_accumulation_steps=PROMPTS * K // 64, lr_scheduler_type="constant",
        temperature=1.0, top_k=0, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(policy_path()),
        reward_funcs=diary,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts("train", 1024)}),
        callbacks=[Stop()],
    )
    diary.began = time.perf_counter()
    trainer.train()


def raft(rate: float, seed: int, steps: int, diary: Diary, folder: str) -> None:
    from raftune.policies.causal_lm import CausalLM
    from raftune.runtime.assembly import PythonObjects
    from raftune.runtime.run import run

    assert CausalLM  # imported, torch with it, before the clock starts

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage_end" and facts["stage"] == "score" and diary.done:
            raise ReachedError

    diary.began = time.perf_counter()
    with contextlib.suppress(ReachedError):
        run(raft_config(rate, seed, steps, folder), PythonObjects(rewards=[diary]), observe=observe)


def raft_config(rate: float, seed: int, steps: int, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder + "/run",
        "seed": seed,
        "num_rounds": steps,
        "prompts_per_round": PROMPTS,
        "keep_models": "last",
        "data": {"prompts": "starter"},
        "policy": {"model": "starter"},
        "sampling": {"num_generations": K, "max_completion_length": LIMIT, "chunk_size": PROMPTS},
        "training": {
            "learning_rate": rate,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "lr_scheduler_type": "constant",
        },
        "evaluation": {"num_prompts": 0, "kl": False},
    }


METHODS = {"grpo": grpo, "raft": raft}


def one(method: str, rate: float, seed: int, steps: int, stop_at: float) -> dict[str, Any]:
    """One run, in this process."""
    diary = Diary(stop_at)
    with tempfile.TemporaryDirectory() as folder:
        METHODS[method](rate, seed, steps, diary, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"method": method, "rate": rate, "seed": seed, "steps": diary.steps(), "peak_mib": round(peak)}


def spawn(*arguments: str) -> dict[str, Any]:
    """One run in a process of its own; what it printed last, read as JSON."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def seconds_to(steps: list[tuple[float, float]], mark: float) -> float | None:
    return next((seconds for seconds, mean in steps if mean >= mark), None)


def compare(args: argparse.Namespace) -> None:
    runs = []
    for seed in range(args.seeds):
        for rate in args.rates:
            for method in METHODS:
                words = ["--one", method, "--rate", str(rate), "--seed", str(seed), "--steps", str(args.steps)]
                runs.append(spawn(*words, "--stop-at", str(max(args.marks))))
                print(line(runs[-1], args.marks), file=sys.stderr, flush=True)
    print(table(runs, args))
    if args.json:
        Path(args.json).write_text(json.dumps(runs))


def line(run: dict[str, Any], marks: list[float]) -> str:
    times = " ".join(f"{m:g}: {t:.1f} s" if (t := seconds_to(run["steps"], m)) else f"{m:g}: —" for m in marks)
    who = f"{run['method']} rate {run['rate']:g} seed {run['seed']}"
    return f"{who}: {len(run['steps'])} steps, {times}, {run['peak_mib']} MiB"


def table(runs: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Medians over seeds at each method's own best rate: what reaches the highest mark most often, and soonest."""
    rows = [
        "| method | rate | s/step | "
        + " | ".join(f"s to {m:g}" for m in args.marks)
        + " | samples to the last | peak MiB |"
    ]
    rows.append("|---" * (len(args.marks) + 5) + "|")
    best = {}
    for method in METHODS:
        by_rate = {rate: [r for r in runs if r["method"] == method and r["rate"] == rate] for rate in args.rates}
        rate = min(by_rate, key=lambda r: cost(by_rate[r], args.marks[-1]))
        best[method] = by_rate[rate]
        rows.append(f"| {method} | {rate:g} | {summary(by_rate[rate], args.marks)} |")
    for mark in args.marks:
        pairs = [
            (seconds_to(g["steps"], mark), seconds_to(r["steps"], mark)) for g, r in zip(*best.values(), strict=True)
        ]
        ratios = [f"{g / r:.1f}" if g and r else "—" for g, r in pairs]
        rows.append(f"\nTo {mark:g}, GRPO takes so many times as long, by seed: {', '.join(ratios)}")
    return "\n".join(rows)


def cost(runs: list[dict[str, Any]], mark: float) -> tuple[int, float]:
    times = [seconds_to(r["steps"], mark) for r in runs]
    reached = [t for t in times if t is not None]
    return (len(times) - len(reached), statistics.median(reached) if reached else float("inf"))


def summary(runs: list[dict[str, Any]], marks: list[float]) -> str:
    per_step = [(b[0] - a[0]) for r in runs for a, b in zip(r["steps"], r["steps"][1:], strict=False)]
    cells = [f"{statistics.median(per_step):.2f}" if per_step else "—"]
    for mark in marks:
        times = [t for r in runs if (t := seconds_to(r["steps"], mark)) is not None]
        cells.append(
            f"{statistics.median(times):.1f} ({len(times)}/{len(runs)})" if times else f"never (0/{len(runs)})"
        )
    counts = [i for r in runs for i, (_, mean) in enumerate(r["steps"], 1) if mean >= marks[-1]][:1]
    cells.append(str(counts[0] * PROMPTS * K) if counts else "—")
    cells.append(str(statistics.median(r["peak_mib"] for r in runs)))
    return " | ".join(cells)


def overhead(rounds: int) -> dict[str, Any]:
    """Seconds of a round in generation, reward and training, and the rest, with and without report and guards."""
    from raftune.policies.causal_lm import CausalLM
    from raftune.rewards.reward_set import RewardSet

    spent = {"generate": 0.0, "reward": 0.0, "train": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    CausalLM.generate = timed("generate", CausalLM.generate)  # type: ignore[method-assign]
    CausalLM.train = timed("train", CausalLM.train)  # type: ignore[method-assign]
    RewardSet.score = timed("reward", RewardSet.score)  # type: ignore[method-assign]
    everything = shares(rounds, spent, {})
    bare = shares(rounds, spent, {"report": False, "guards": {"enabled": False}})
    # What threads do beside generation and training makes these slower, which "rest" does not show.
    longer = round(everything["wall"] / bare["wall"] - 1, 4)
    return {"all": everything, "without page and guards": bare, "a round is longer with them by": longer}


def shares(rounds: int, spent: dict[str, float], changes: dict[str, Any]) -> dict[str, float]:
    """Medians over the rounds of one run; `spent` grows while it works."""
    from raftune.runtime.assembly import PythonObjects
    from raftune.runtime.run import run

    marks: list[tuple[float, dict[str, float]]] = []

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "round_end":
            marks.append((time.perf_counter(), dict(spent)))

    with tempfile.TemporaryDirectory() as folder:
        config = raft_config(1e-3, 0, rounds, folder) | changes
        run(config, PythonObjects(rewards=[Diary(float("inf"))]), observe=observe)
    rows = []
    for (t0, a), (t1, b) in itertools.pairwise(marks[1:]):  # the first round warms up
        inside = {name: b[name] - a[name] for name in spent}
        rows.append({"wall": t1 - t0, **inside, "rest": t1 - t0 - sum(inside.values())})
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    found = {name: round(value, 4) for name, value in middle.items()}
    return {**found, "overhead": round(middle["rest"] / middle["wall"], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--marks", type=float, nargs="+", default=[1.5, 2.5, 3.0])
    parser.add_argument("--steps", type=int, default=40, help="steps (GRPO) or rounds (RAFT) at most")
    parser.add_argument("--json", help="a file for every run's numbers")
    parser.add_argument(
        "--overhead", type=int, nargs="?", const=8, help="measure the loop's own share over so many rounds"
    )
    parser.add_argument("--one", choices=sorted(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stop-at", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.rate, args.seed, args.steps, args.stop_at)))
    elif args.overhead:
        print(json.dumps(overhead(args.overhead), indent=2))
    else:
        compare(args)


if __name__ == "__main__":
    main()
