"""A selection rule of your own: the best of each prompt, but only of the prompts where choosing gains most.

python examples/rule.py                                      the bundled model, offline, about 20 seconds on a CPU
"""

import argparse
from dataclasses import dataclass

import numpy as np

import raftune


@dataclass
class LargestGain:
    """`share` of the prompts: those whose best candidate is furthest above their mean."""

    share: float = 0.5
    reasons = ("best of a prompt with a large gain", "a better one was kept", "its prompt gains little")

    def decide(self, pool, seed):
        """Weights and reasons of candidates, sorted by prompt, best first. `pool.start`: the first of each prompt."""
        gain = pool.score[pool.start] - np.add.reduceat(pool.score, pool.start) / pool.size
        chosen = np.zeros(len(gain), bool)
        chosen[np.argsort(-gain, kind="stable")[: max(1, round(self.share * len(gain)))]] = True
        large = pool.of_prompt(chosen)
        kept = large & (pool.rank == 1)
        return kept.astype(float), np.where(kept, 0, np.where(large, 1, 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.5, help="of the prompts, to learn from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts_per_round", type=int, default=64)
    parser.add_argument("--max_completion_length", type=int, default=64)
    parser.add_argument("--num_eval_prompts", type=int, default=16)
    parser.add_argument("--output_dir", default="runs/rule")
    args = parser.parse_args()

    outcome = raftune.run(
        {
            "output_dir": args.output_dir,
            "num_rounds": args.rounds,
            "prompts_per_round": args.prompts_per_round,
            "data": {"prompts": "starter"},
            "policy": {"model": "starter"},
            "sampling": {"max_completion_length": args.max_completion_length},
            "rewards": {"reward_funcs": ["starter"]},
            "selection": {"rule": f"{__file__}:LargestGain", "options": {"share": args.share}},
            "training": {"learning_rate": 5e-4, "num_train_epochs": 2},
            "evaluation": {"prompts": "starter", "num_prompts": args.num_eval_prompts},
        }
    )
    print(f"best round: {outcome.best}, reward on held-out prompts: {outcome.value:.3f}")
    print(f"reasons:    raftune samples {args.output_dir}")
