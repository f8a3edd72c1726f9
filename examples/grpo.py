"""A GRPO script ported to RAFT. Two names change: GRPOConfig becomes RaftConfig, GRPOTrainer becomes RaftTrainer.

python examples/grpo.py                                      the bundled model, offline, about 20 seconds on a CPU
python examples/grpo.py --num_rounds 8 --learning_rate 1e-3  every field of RaftConfig is a flag
python examples/grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --learning_rate 1e-5
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import HfArgumentParser

from raftune import RaftConfig, RaftTrainer  # was: from trl import GRPOConfig, GRPOTrainer
from raftune.starters import text

POLITE = ("please", "thank", "glad", "happy", "sure", "welcome", "hope", "enjoy")


@dataclass
class ScriptArguments:
    model: str = field(default="starter", metadata={"help": "A folder, a hub name, or the bundled model."})
    num_prompts: int = field(default=256, metadata={"help": "Training prompts."})


def polite_reward(completions, **kwargs):
    """1 for a completion with a polite word, else 0. The signature is that of TRL's reward functions."""
    return [float(any(word in completion.lower() for word in POLITE)) for completion in completions]


def length_reward(completions, **kwargs):
    """0 at twenty words, negative for shorter and longer completions."""
    return [-abs(len(completion.split()) - 20) / 20 for completion in completions]


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, RaftConfig))  # was: GRPOConfig
    parser.set_defaults(output_dir="runs/grpo", num_rounds=3, prompts_per_round=32, learning_rate=5e-4)
    parser.set_defaults(num_generations=8, max_completion_length=64, num_train_epochs=2, num_eval_prompts=32)
    script_args, training_args = parser.parse_args_into_dataclasses()

    trainer = RaftTrainer(  # was: GRPOTrainer
        model=script_args.model,
        reward_funcs=[polite_reward, length_reward],
        args=training_args,
        train_dataset=Dataset.from_dict({"prompt": text.prompts("train", script_args.num_prompts, seed=0)}),
        eval_dataset=Dataset.from_dict({"prompt": text.prompts("heldout", 32, seed=0)}),
    )
    trainer.train()
    trainer.save_model()  # the model of the best round, into output_dir
    print(f"reward on held-out prompts: {trainer.evaluate()['eval_reward']:.3f}")
