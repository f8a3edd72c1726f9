"""The paper's claims at a size that runs on two cores: one table, one figure a claim, and where ours differ.

    python benchmarks/paper.py                              everything, three seeds: about 20 minutes on two quiet cores
    python benchmarks/paper.py --claims k,beta --seeds 1    some claims; arms that several claims share are run once
    python benchmarks/paper.py --list                       the claims and their arms

Arms run two at a time, each in a process of its own with one thread. A call that was stopped is continued by the same
call, and a later one with more seeds or claims adds what is missing. Runs and models lie under --work, the page with
its figures under --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from claims.arms import ARMS, Sizes, make_student, result_file, run_arm
from claims.page import write_page
from claims.table import CLAIMS, Claim, Results
from side_by_side import run_side_by_side

Job = tuple[str, int]  # an arm and a seed


def main() -> None:
    args = arguments()
    sizes = Sizes(args.rounds, args.prompts, args.held_out, args.draws)
    if args.one:
        run_arm(ARMS[args.one], args.seed, sizes, args.work / sizes.folder)
        return
    claims = chosen(args.claims)
    if args.list:
        for claim in claims:
            print(f"{claim.name:<12} {claim.title}: {', '.join(claim.arms)}")
        return
    seeds = list(range(args.seeds))
    results = run_all(jobs_of(claims, seeds), sizes, args.work)
    print(write_page(claims, results, seeds, sizes, args.out))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=Sizes.rounds)
    parser.add_argument("--prompts", type=int, default=Sizes.prompts, help="prompts in each round")
    parser.add_argument("--held-out", type=int, default=Sizes.held_out, help="prompts to judge by, at most 256")
    parser.add_argument("--draws", type=int, default=Sizes.draws, help="completions for each of these")
    parser.add_argument("--claims", default="all", help="names, joined by commas; --list shows them")
    parser.add_argument("--out", type=Path, default=Path("docs/paper"))
    parser.add_argument("--work", type=Path, default=Path("runs/paper"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--one", choices=sorted(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work.resolve()
    for name in ("seeds", "rounds", "prompts", "held_out", "draws"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}.")
    return args


def chosen(names: str) -> list[Claim]:
    """The claims of these names; exits with the names that there are."""
    known = {claim.name: claim for claim in CLAIMS}
    wanted = list(known) if names == "all" else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"--claims must be all, or of {', '.join(known)}; got {unknown[0]!r}.")
    return [known[name] for name in wanted]


def jobs_of(claims: Sequence[Claim], seeds: Sequence[int]) -> list[Job]:
    """Each arm once a seed; those that others wait for come first, then the longest."""
    wanted = {arm for claim in claims for arm in claim.arms}
    wanted |= {needed for arm in wanted for needed in ARMS[arm].after}
    order = sorted((name for name in ARMS if name in wanted), key=lambda name: bool(ARMS[name].after))
    return [(name, seed) for name in order for seed in seeds]


def run_all(jobs: list[Job], sizes: Sizes, work: Path) -> Results:
    """The numbers of every arm and seed; what an earlier call measured is read."""
    here = work / sizes.folder
    if any(ARMS[name].origin == "student" for name, _ in jobs):
        make_student(work)
    todo = [job for job in jobs if not result_file(ARMS[job[0]], job[1], here).is_file()]
    print(f"{len(jobs)} arms and seeds, {len(jobs) - len(todo)} done before", file=sys.stderr, flush=True)
    for late in (False, True):
        wave = [job for job in todo if bool(ARMS[job[0]].after) == late]
        run_side_by_side(__file__, [(" seed ".join(map(str, job)), words_of(job, sizes, work)) for job in wave])
    return {job: json.loads(result_file(ARMS[job[0]], job[1], here).read_text()) for job in jobs}


def words_of(job: Job, sizes: Sizes, work: Path) -> list[str]:
    """What this script is called with to run one arm."""
    name, seed = job
    words = ["--one", name, "--seed", str(seed), "--work", str(work), "--rounds", str(sizes.rounds)]
    return [*words, "--prompts", str(sizes.prompts), "--held-out", str(sizes.held_out), "--draws", str(sizes.draws)]


if __name__ == "__main__":
    main()
