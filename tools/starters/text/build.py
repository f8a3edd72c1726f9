"""Trains everything that raftune/starters/text/weights/ holds: `python -m tools.starters.text.build` (or `make
starters`).

In order: a tokenizer; the policy, a small Llama trained on the whole corpus, bad manners included; the reward model, a
small Llama with one score, trained on ranked replies of the generator and of the policy itself. Each step is a function
of the seed: on one machine with one thread count, two builds give the same files. It takes some minutes on two cores.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from raftune.arrays import FloatArray
from raftune.starters.text import WEIGHTS, corpus
from raftune.store.files import dump_json
from tools.starters.optimizer import Optimizer, emit
from tools.starters.text.reward_training import (
    TextRewardRecipe,
    policy_groups,
    ranked,
    score_rows,
    train_reward,
)
from tools.starters.text.training import encode, llama_config, pad_right, save, train_tokenizer

TYPICAL_LENGTH: Final = 20  # tokens in a reply
KNOWING: Final = ("good", "half_polite", "advice", "rude_advice")


class TextPolicyRecipe(NamedTuple):
    """Every number that shapes the policy."""

    steps: int = 1500
    knowledge_steps: int = 800  # the first of them, on replies that hold right advice only
    rate: float = 4e-3
    dialogues_a_step: int = 64


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the bundled text starter.")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep-policy", action="store_true", help="use the policy that lies in OUT; train the rest")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not options.keep_policy:
        build_policy(options.out, options.seed, TextPolicyRecipe())
    build_reward(options.out, options.seed, TextPolicyRecipe(), TextRewardRecipe())


def build_policy(out: Path, seed: int, recipe: TextPolicyRecipe) -> None:
    """Writes `policy/`, tokenizer included, to `out`."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(d.prompt + d.completion for d in corpus.dialogues(20_000, seed))
    save(train_policy(tokenizer, recipe, seed + 1), tokenizer, out / "policy")


def build_reward(out: Path, seed: int, policy_recipe: TextPolicyRecipe, recipe: TextRewardRecipe) -> dict[str, Any]:
    """Writes `reward/` and `manifest.json` to `out`, where `policy/` lies, and returns the manifest."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "policy")
    policy = LlamaForCausalLM.from_pretrained(out / "policy", dtype=torch.float32)  # sample what is on disk
    save(train_reward(policy, tokenizer, recipe, seed + 2), tokenizer, out / "reward")
    reward = LlamaForSequenceClassification.from_pretrained(out / "reward", dtype=torch.float32)
    manifest = {
        "made_by": "python -m tools.starters.text.build",
        "seed": seed,
        "policy": {**policy_recipe._asdict(), "parameters": policy.num_parameters(), "bytes": size(out / "policy")},
        "reward": {**recipe._asdict(), "parameters": reward.num_parameters(), "bytes": size(out / "reward")},
        "measured_on_heldout_prompts": measure(policy, reward, tokenizer, seed + 1_000),
    }
    dump_json(out / "manifest.json", manifest, sort_keys=False)
    emit(json.dumps(manifest["measured_on_heldout_prompts"], indent=2))
    return manifest


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def train_policy(tokenizer: PreTrainedTokenizerFast, recipe: TextPolicyRecipe, seed: int) -> LlamaForCausalLM:
    """A Llama of about 0.9M parameters that first learns what is right, and then to speak as the corpus does."""
    policy = LlamaForCausalLM(llama_config(tokenizer, hidden_size=128, num_hidden_layers=4, intermediate_size=352))
    emit(f"policy: {policy.num_parameters():,} parameters, {recipe.steps} steps")
    descent = Optimizer("policy", policy, recipe.rate, recipe.steps)
    rng = Random(seed)
    lessons = dialogue_batches(tokenizer, recipe.dialogues_a_step, rng, KNOWING)
    everything = dialogue_batches(tokenizer, recipe.dialogues_a_step, rng, None)
    for rows in islice(chain(islice(lessons, recipe.knowledge_steps), everything), recipe.steps):
        ids_BT = pad_right([row.ids for row in rows], tokenizer.pad_token_id)
        labels_BT = pad_right([[-100] * row.prompt_length + row.ids[row.prompt_length :] for row in rows], -100)
        # One divisor for all batches: by its own count of tokens, a batch of short replies would weigh ten times more.
        tokens = len(rows) * TYPICAL_LENGTH
        descent.advance(policy(input_ids=ids_BT, labels=labels_BT, num_items_in_batch=tokens).loss)
    return policy.eval()


class DialogueRow(NamedTuple):
    """One dialogue as token ids, EOS included; the first `prompt_length` of them are the prompt's."""

    ids: list[int]
    prompt_length: int


def dialogue_batches(
    tokenizer: PreTrainedTokenizerFast, size: int, rng: Random, kinds: Sequence[str] | None
) -> Iterator[list[DialogueRow]]:
    """Batches of like lengths, for ever: pools of 64 batches, sorted by length, their batches in random order."""
    while True:
        dialogues = list(corpus.dialogues(64 * size, rng.getrandbits(62), kinds=kinds))
        whole = encode(tokenizer, (d.prompt + d.completion for d in dialogues))
        lengths = map(len, encode(tokenizer, (d.prompt for d in dialogues)))
        rows = [DialogueRow([*ids, tokenizer.eos_token_id], length) for ids, length in zip(whole, lengths, strict=True)]
        rows.sort(key=lambda row: len(row.ids))
        starts = list(range(0, len(rows), size))
        rng.shuffle(starts)
        yield from (rows[start : start + size] for start in starts)


# --- what was reached ---


@torch.no_grad()
def measure(
    policy: LlamaForCausalLM, reward: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, seed: int
) -> dict[str, float]:
    """Facts on 128 held-out prompts x 8 replies: the judge's means, the reward model's accuracies and correlation."""
    prompts = corpus.prompts("heldout", 128, seed)
    own = policy_groups(policy, tokenizer, prompts, 8, seed)
    scores_NK = np.array([group.scores for group in own])
    rewards_NK = np.array([score_rows(reward, group.rows, tokenizer.pad_token_id).numpy() for group in own])
    picked_N = np.take_along_axis(scores_NK, rewards_NK.argmax(1)[:, None], 1)
    pairs = [good_and_bad(tokenizer, prompt, Random(seed + i)) for i, prompt in enumerate(prompts)]
    told_N2 = np.array([score_rows(reward, rows, tokenizer.pad_token_id).numpy() for rows in pairs])
    found = {
        "judge_mean_of_policy": scores_NK.mean(),
        "judge_mean_of_best_of_8_by_reward_model": picked_N.mean(),
        "judge_mean_of_best_of_8_by_judge": scores_NK.max(1).mean(),
        "reward_accuracy_good_over_bad_kind": (told_N2[:, 0] > told_N2[:, 1]).mean(),
        "reward_accuracy_on_policy_pairs": pair_accuracy(scores_NK, rewards_NK),
        "reward_correlation_with_judge": np.corrcoef(scores_NK.ravel(), rewards_NK.ravel())[0, 1],
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def good_and_bad(tokenizer: PreTrainedTokenizerFast, prompt: str, rng: Random) -> list[list[int]]:
    """A good reply to the prompt and one that is not: rude, curt, rambling, wrong, empty or unfinished."""
    request = corpus.read_request(prompt)
    assert request is not None, prompt
    bad = rng.choice([name for name in corpus.KINDS if name not in ("good", "half_polite", "advice")])
    return ranked(tokenizer, prompt, [corpus.reply(request, rng, [kind]).completion for kind in ("good", bad)]).rows


def pair_accuracy(scores_NK: FloatArray, rewards_NK: FloatArray) -> float:
    """The share of pairs inside a group, with different judge's scores, that the reward model orders alike."""
    left, right = np.triu_indices(scores_NK.shape[1], 1)
    gap = scores_NK[:, left] - scores_NK[:, right]
    told = rewards_NK[:, left] - rewards_NK[:, right]
    differ = np.abs(gap) > 1e-9
    return float((np.sign(gap[differ]) == np.sign(told[differ])).mean())


if __name__ == "__main__":
    main()
