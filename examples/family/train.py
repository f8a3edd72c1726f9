"""Align a policy family of your own: a bigram model of letters learns words that can be pronounced.

python examples/family/train.py                              offline, a few seconds
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import raftune

FAMILY = Path(__file__).with_name("family.py")


def pronounceable(completions, **kwargs):
    """1 for each pair of neighbours of which exactly one is a vowel, else -1; summed, and divided by 9, the most."""
    pairs = [[(a in "aeiou") != (b in "aeiou") for a, b in pairwise(word)] for word in completions]
    return [(2 * sum(pair) - len(pair)) / 9 for pair in pairs]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts_per_round", type=int, default=64)
    parser.add_argument("--output_dir", default="runs/family")
    args = parser.parse_args()

    letters = [{"prompt": letter} for letter in "bcdfglmnprstvw"]
    prompts = Path(args.output_dir).with_name("letters.jsonl")
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in letters))

    outcome = raftune.run(
        {
            "output_dir": args.output_dir,
            "num_rounds": args.rounds,
            "prompts_per_round": args.prompts_per_round,
            "data": {"prompts": str(prompts)},
            "policy": {"family": f"{FAMILY}:Bigrams"},
            "sampling": {"num_generations": 16},
            "rewards": {"reward_funcs": [f"{__file__}:pronounceable"]},
            "evaluation": {"prompts": str(prompts), "num_prompts": len(letters)},
        }
    )
    print(f"best round: {outcome.best}, reward: {outcome.value:.3f}")
    print(f"words:      raftune samples {args.output_dir} --sort best")
