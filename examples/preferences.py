"""From preferences to a reward model, and from the reward model to an aligned model.

python examples/preferences.py                               bundled data and models, offline, about a minute on a CPU
python examples/preferences.py --data trl-lib/ultrafeedback_binarized --model Qwen/Qwen2.5-0.5B-Instruct

`raftune sft` trains on the chosen completions first, where the model does not know the task: docs/from_preferences.md.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from raftune import RaftConfig, RaftTrainer
from raftune.config.reward_model import RewardModelConfig
from raftune.reward_models.training import train_reward_model
from raftune.rewards.loading import load_reward
from raftune.starters import text
from raftune.starters.text.preferences import write_starter


@dataclass
class ScriptArguments:
    data: str | None = field(default=None, metadata={"help": "Rows with chosen and rejected; default: bundled."})
    prompts: str | None = field(default=None, metadata={"help": "Rows with a prompt; default: bundled."})
    model: str = field(default="starter", metadata={"help": "The policy, and the backbone of the reward model."})
    num_preferences: int = field(default=2000, metadata={"help": "Bundled preferences to write."})


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, RaftConfig))
    parser.set_defaults(output_dir="runs/preferences/run", num_rounds=3, prompts_per_round=32, learning_rate=5e-4)
    parser.set_defaults(num_generations=8, max_completion_length=64, num_train_epochs=2, num_eval_prompts=32)
    script_args, training_args = parser.parse_args_into_dataclasses()
    folder = Path(training_args.output_dir).parent

    # 1. Preferences: rows with `prompt`, `chosen` and `rejected`.
    data = script_args.data or str(folder / "data" / "preferences.jsonl")
    prompts = script_args.prompts or str(folder / "data" / "prompts.jsonl")
    if script_args.data is None and not Path(data).exists():
        write_starter(folder / "data", rows=script_args.num_preferences)

    # 2. A reward model. It is saved only if it ranks held-out preferences better than chance.
    backbone = str(text.policy_path()) if script_args.model == "starter" else script_args.model
    config = RewardModelConfig(data=data, model=backbone, output_dir=str(folder / "reward"))
    outcome = train_reward_model(config, lambda model: load_reward(str(model)))
    if not outcome.published:
        raise SystemExit(f"the reward model {outcome.report['verdict']}")
    print(f"accuracy on held-out preferences: {outcome.report['accuracy']['mean']:.2f}")

    # 3. An aligned model: each round trains on the best completions by that reward model.
    trainer = RaftTrainer(
        model=script_args.model,
        reward_funcs=str(outcome.root / "model"),
        args=training_args,
        train_dataset=prompts,
    )
    trainer.train()
    trainer.save_model(folder / "model")
    print(f"reward on held-out prompts: {trainer.evaluate()['eval_reward']:.3f}")
