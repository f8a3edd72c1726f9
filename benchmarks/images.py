"""The paper's two diffusion tasks, at a size that runs on two cores: adaptation to a resolution, and to the caption.

    python benchmarks/images.py                            both, three seeds: about an hour on two cores
    python benchmarks/images.py --tasks alignment --seeds 1
    python benchmarks/images.py --list                     the tasks and their arms

Each task has a base (nothing is learned), RAFT, and the control that keeps one of K by chance; where a size is what the
base fails at, it is also judged at its own. Every arm's last model is judged on the same prompts and seeds by a
classifier that nothing was trained on; variety and drift are measured on the reward's CLIP features. Arms run two at a
time, each in a process of its own with one thread. A call that was stopped is continued by the same call. Runs lie
under --work, the page and its images under --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from side_by_side import THREADS, run_side_by_side
from tasks.page import write_page

ARMS = ("native", "base", "random", "raft")
UNTRAINED = ("native", "base")
# Reported beside the judge, and no part of its sum.
ALL_RIGHT = {"spec": "raftune.starters.image.judge:all_right", "name": "all_right", "weight": 0.0}


@dataclass(frozen=True)
class Task:
    """What is trained and by what it is judged. `sets` are the splits of captions that every arm is judged on."""

    name: str
    title: str
    reward: str
    sets: Mapping[str, str]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 5
    prompts: int = 64
    rate: float = 2e-4

    @property
    def arms(self) -> tuple[str, ...]:
        return ARMS if self.sampling else ARMS[1:]


TASKS = {
    task.name: task
    for task in (
        Task(
            "resolution",
            "Resolution adaptation: trained at 32 px, generated at 48 px",
            "starter:aesthetic",
            {"heldout": "held-out captions, at 48 px"},
            {"height": 48, "width": 48},
            prompts=48,
        ),
        Task(
            "alignment",
            "Text-image alignment by CLIP score",
            "starter",
            {"train": "captions of the training set", "unseen": "pairs of colour and shape that were never trained on"},
        ),
    )
}
Job = tuple[str, str, int]  # task, arm, seed


def main() -> None:
    args = arguments()
    if args.list:
        for task in TASKS.values():
            print(f"{task.name:<12} {task.title}: {', '.join(task.arms)}; reward {task.reward}")
        return
    if args.one:
        run_arm(TASKS[args.one], args.arm, args.seed, args)
        return
    names = list(TASKS) if args.tasks == "all" else args.tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        sys.exit(f"--tasks must be all, or of {', '.join(TASKS)}; got {unknown[0]!r}.")
    run_all([(name, arm, seed) for name in names for arm in TASKS[name].arms for seed in range(args.seeds)], args)
    print(write_page([TASKS[name] for name in names], args.seeds, args.held_out, args.draws, args.work, args.out))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", default="all", help="names, joined by commas; --list shows them")
    parser.add_argument("--held-out", type=int, default=96, help="prompts to judge by, of each set")
    parser.add_argument("--draws", type=int, default=4, help="images of each of these")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--work", type=Path, default=Path("runs/images"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--one", choices=sorted(TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work.resolve()
    for name in ("seeds", "held_out", "draws"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}.")
    return args


# -- one arm -----------------------------------------------------------------------------------------------------------


def run_arm(task: Task, arm: str, seed: int, args: argparse.Namespace) -> None:
    """Trains the arm, judges its last model on every set, and writes the numbers; continues an interrupted run."""
    from raftune.runtime.run import run

    began = time.perf_counter()
    if arm not in UNTRAINED:
        run(settings(task, arm, seed, args.work))
    sets = {name: judged(task, arm, seed, name, args) for name in task.sets}
    path = result_file(task.name, arm, seed, args.work)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"sets": sets, "seconds": round(time.perf_counter() - began, 1)}, indent=1) + "\n")


def settings(task: Task, arm: str, seed: int, work: Path) -> dict[str, Any]:
    """The configuration of the arm's run; nothing is evaluated on the way."""
    return {
        "name": f"{task.name}-{arm}-{seed}",
        "output_dir": str(run_folder(task, arm, seed, work)),
        "seed": seed,
        "num_rounds": task.rounds,
        "prompts_per_round": task.prompts,
        "report": False,
        "data": {"prompts": "starter"},
        "policy": {"family": "diffusion", "model": "starter"},
        "sampling": {"num_generations": 8, "diffusion": dialled(task, arm)},
        "rewards": {"reward_funcs": [task.reward]},
        "selection": {"rule": "random"} if arm == "random" else {},
        "training": {
            "learning_rate": task.rate,
            "per_device_train_batch_size": 48,
            "max_steps": 60,
            "replay_rounds": 2,
        },
        "evaluation": {"num_prompts": 0},
        "engine": {"threads": THREADS},
    }


def dialled(task: Task, arm: str) -> dict[str, Any]:
    """How the arm generates: the task's way, but for the base at the size that it was trained at."""
    return {"num_inference_steps": 12, "guidance_scale": 1.0, **({} if arm == "native" else task.sampling)}


def judged(task: Task, arm: str, seed: int, split: str, args: argparse.Namespace) -> dict[str, float]:
    """What the arm's last model is worth on a set of captions; every arm is asked the same, with the same seeds."""
    from raftune.evaluation.history import metrics_of
    from raftune.runtime.evaluation_target import evaluation_of, parse_target
    from raftune.runtime.run import run
    from raftune.store.run import RunFolder

    place = run_folder(task, arm, seed, args.work)
    subject = parse_target("starter" if arm in UNTRAINED else f"{place}@last")
    flags = {
        "policy.family": "diffusion",
        "output_dir": str(judged_folder(task.name, arm, seed, split, args.work)),
        "rewards.reward_funcs": [task.reward],
        "evaluation.prompts": str(captions(split, seed, args)),
        "evaluation.num_prompts": args.held_out,
        "evaluation.num_generations": args.draws,
        "evaluation.seed": seed,
        "evaluation.reward_funcs": ["starter:judge", ALL_RIGHT],
        "evaluation.features": "starter",
        "engine.threads": THREADS,
        "report": False,
        **{f"sampling.diffusion.{name}": value for name, value in dialled(task, arm).items()},
    }
    if arm not in UNTRAINED:
        del flags["policy.family"]
    config = evaluation_of(subject, [], flags)
    run(config)
    found = metrics_of(RunFolder(config.output_dir), 0)
    return {name: value for name, value in map(number, found.items()) if value is not None}


def number(entry: tuple[str, Any]) -> tuple[str, float | None]:
    """A metric as one number, where it is one."""
    name, value = entry
    value = value.get("mean") if isinstance(value, dict) else value
    return name, value if isinstance(value, int | float) else None


def captions(split: str, seed: int, args: argparse.Namespace) -> Path:
    """The file of the captions of a split that are judged under this seed."""
    from raftune.starters import image

    path = args.work / "captions" / f"{split}-{seed}-{args.held_out}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt}) for prompt in image.prompts(split, args.held_out, seed=1000 + seed)]
    path.write_text("\n".join(lines) + "\n")
    return path


def run_folder(task: Task, arm: str, seed: int, work: Path) -> Path:
    return work / "runs" / f"{task.name}-{arm}-{seed}"


def judged_folder(task: str, arm: str, seed: int, split: str, work: Path) -> Path:
    return work / "judged" / f"{task}-{arm}-{seed}-{split}"


def result_file(task: str, arm: str, seed: int, work: Path) -> Path:
    return work / "results" / f"{task}-{arm}-{seed}.json"


# -- all arms ----------------------------------------------------------------------------------------------------------


def run_all(jobs: list[Job], args: argparse.Namespace) -> None:
    """Writes the numbers of every task, arm and seed that an earlier call did not."""
    todo = [job for job in jobs if not result_file(*job, args.work).is_file()]
    print(f"{len(jobs)} arms and seeds, {len(jobs) - len(todo)} done before", file=sys.stderr, flush=True)
    run_side_by_side(__file__, [(" ".join(map(str, job)), words_of(job, args)) for job in todo])


def words_of(job: Job, args: argparse.Namespace) -> list[str]:
    """What this script is called with to run one arm."""
    task, arm, seed = job
    words = ["--one", task, "--arm", arm, "--seed", str(seed), "--work", str(args.work)]
    return [*words, "--held-out", str(args.held_out), "--draws", str(args.draws)]


if __name__ == "__main__":
    main()
