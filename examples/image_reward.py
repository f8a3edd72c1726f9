"""A reward function of images: a diffusion pipeline learns to generate darker images of what the caption says.

python examples/image_reward.py                              the bundled pipeline, offline, about a minute on a CPU
python examples/image_reward.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts captions.jsonl --size 512
"""

import argparse

import numpy as np

import raftune


def darkness(prompts, completions, **kwargs):
    """1 for a black image, 0 for a white one. Completions are PIL images."""
    return [1 - float(np.asarray(image.convert("L")).mean()) / 255 for image in completions]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter", help="a pipeline's folder or hub name, or the bundled one")
    parser.add_argument("--prompts", default="starter", help="a file with a column `prompt`, or the bundled captions")
    parser.add_argument("--clip", default="starter", help="clip_score, or the bundled CLIP model")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts_per_round", type=int, default=24)
    parser.add_argument("--num_generations", type=int, default=4, help="images generated for each caption")
    parser.add_argument("--train_steps", type=int, default=32, help="optimizer steps in each round")
    parser.add_argument("--output_dir", default="runs/image_reward")
    args = parser.parse_args()

    outcome = raftune.run(
        {
            "output_dir": args.output_dir,
            "num_rounds": args.rounds,
            "prompts_per_round": args.prompts_per_round,
            "data": {"prompts": args.prompts},
            "policy": {"family": "diffusion", "model": args.model},
            "sampling": {
                "num_generations": args.num_generations,
                "diffusion": {"num_inference_steps": args.steps, "guidance_scale": 1.0}
                | {"height": args.size, "width": args.size},
            },
            # This function beside a CLIP score, each ranked within its prompt: dark, and still what the caption says.
            "rewards": {"reward_funcs": [f"{__file__}:darkness", args.clip], "combine": "rank"},
            "training": {"learning_rate": 2e-4, "max_steps": args.train_steps},
            "evaluation": {"prompts": args.prompts, "num_prompts": 16, "num_generations": 2, "best_by": "darkness"},
        }
    )
    print(f"best round: {outcome.best}, darkness on held-out captions: {outcome.value:.3f}")
    print(f"report: {args.output_dir}/report.html")
