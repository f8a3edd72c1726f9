"""Resume a run, then decide again: another selection rule on the same samples. Only what depends on it is done again.

python examples/resume_and_reselect.py                       the bundled model, offline, about 20 seconds on a CPU
"""

import argparse

import raftune
from raftune.analysis.whatif import reselect


class StageLog(list):
    """The stages that run, in order. Before the stage `interrupt_at` it interrupts the run as Ctrl-C would."""

    def __init__(self, interrupt_at=None):
        self.interrupt_at = interrupt_at

    def __call__(self, event, details):
        if event == "stage_begin":
            self.append(f"{details['round']}/{details['stage']}")
            if self[-1] == self.interrupt_at:
                raise KeyboardInterrupt


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts_per_round", type=int, default=16)
    parser.add_argument("--max_completion_length", type=int, default=64)
    parser.add_argument("--output_dir", default="runs/resume_and_reselect")
    args = parser.parse_args()
    config = {
        "output_dir": args.output_dir,
        "num_rounds": 2,
        "prompts_per_round": args.prompts_per_round,
        "data": {"prompts": "starter"},
        "policy": {"model": "starter"},
        "sampling": {"num_generations": 8, "max_completion_length": args.max_completion_length},
        "rewards": {"reward_funcs": ["starter"]},
        "training": {"learning_rate": 5e-4},
        "evaluation": {"prompts": "starter", "num_prompts": args.prompts_per_round},
    }
    try:
        raftune.run(config, observe=StageLog(interrupt_at="2/score"))
    except KeyboardInterrupt:
        print("interrupted before 2/score")
    log = StageLog()
    raftune.resume(args.output_dir, observe=log)
    print("resumed:    ", *log)

    # What would the two best of each prompt be, instead of the best? Nothing is generated, scored or written.
    flags = {"selection.rule": "top_m", "selection.m": 2}
    total = reselect(args.output_dir, flags, dry_run=True).difference.all
    print(f"kept:        {total.before.samples} samples before, {total.now.samples} now, {total.in_both} in both")
    print(f"mean reward: {total.before.reward_now:.3f} before, {total.now.reward_now:.3f} now")

    # Really do it. Round 1 keeps its samples and scores. Round 2 generates anew, from the new model of round 1.
    log = StageLog()
    raftune.run(config | {"selection": {"rule": "top_m", "m": 2}}, observe=log, redo="1/select")
    print("done again: ", *log)
    print(f"set aside:   {args.output_dir}/superseded")
