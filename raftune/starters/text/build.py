"""Trains everything that `weights/` holds: `python -m raftune.starters.text.build` (or `make starters`).

In order: a tokenizer, the policy (a small Llama, trained on the whole corpus, bad manners included), the reward model (a small
Llama with one score, trained on ranked replies of the generator and of the policy itself). Each step is a function of the
seed; on one machine with one thread count, two builds give the same files. It takes some minutes on two cores.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from raftune.starters.text import corpus
from raftune.starters.text.judge import judge

VOCABULARY: Final = 1400
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
MAX_POSITIONS: Final = 256
KNOWING: Final = ("good", "half_polite", "advice", "rude_advice")


class Recipe(NamedTuple):
    """Every number that shapes the weights."""

    seed: int = 0
    threads: int = 2
    policy_steps: int = 1500
    knowledge_steps: int = 900  # the first of them, on replies that hold right advice only
    policy_rate: float = 4e-3
    policy_batch: int = 64
    reward_steps: int = 1500
    reward_rate: float = 2e-3
    reward_batch: int = 24  # prompts; each brings `replies` ranked replies
    replies: int = 6
    sampled_prompts: int = 900  # prompts whose policy samples join the ranking
    label_sharpness: float = 4.0  # P(i is labelled better than j) = sigmoid(sharpness * (judge_i - judge_j))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the bundled text starter.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy-steps", type=int, default=Recipe().policy_steps)
    parser.add_argument("--reward-steps", type=int, default=Recipe().reward_steps)
    parser.add_argument("--sampled-prompts", type=int, default=Recipe().sampled_prompts)
    options = vars(parser.parse_args(arguments))
    build(options.pop("out"), Recipe(**options))


def build(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Writes `policy/`, `reward/` and `manifest.json` to `out`, and returns the manifest."""
    start = time.monotonic()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe.seed)
    policy = train_policy(tokenizer, recipe)
    save(policy, tokenizer, out / "policy")
    policy = LlamaForCausalLM.from_pretrained(out / "policy", dtype=torch.float32)  # what is on disk is what is sampled
    reward = train_reward(policy, tokenizer, recipe)
    save(reward, tokenizer, out / "reward")
    reward = LlamaForSequenceClassification.from_pretrained(out / "reward", dtype=torch.float32)
    manifest = {
        "made_by": "python -m raftune.starters.text.build",
        "recipe": recipe._asdict(),
        "parameters": {"policy": policy.num_parameters(), "reward": reward.num_parameters()},
        "bytes": {name: sum(f.stat().st_size for f in (out / name).iterdir()) for name in ("policy", "reward")},
        "measured": measure(policy, reward, tokenizer, recipe.seed + 1_000),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    say(f"done in {time.monotonic() - start:.0f} s: {json.dumps(manifest['measured'])}")
    return manifest


def say(line: str) -> None:
    print(line, flush=True)


# --- tokenizer ---


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the corpus that puts BOS first; EOS is left to whoever encodes a reply."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d.prompt + d.completion for d in corpus.dialogues(20_000, seed)), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts))["input_ids"]
    return ids


def pad_right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


# --- policy ---


def train_policy(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """A Llama of about 0.9M parameters that speaks as the corpus does."""
    policy = LlamaForCausalLM(llama_config(tokenizer, hidden_size=128, num_hidden_layers=4, intermediate_size=352))
    say(f"policy: {policy.num_parameters():,} parameters, {recipe.policy_steps} steps")
    optimizer, schedule = adam(policy, recipe.policy_rate, recipe.policy_steps)
    manners = Random(recipe.seed + 1)
    lessons = dialogue_batches(tokenizer, recipe.policy_batch, manners, KNOWING)
    everything = dialogue_batches(tokenizer, recipe.policy_batch, manners, None)
    batches = chain(islice(lessons, recipe.knowledge_steps), everything)
    recent: list[float] = []
    for step, rows in zip(range(recipe.policy_steps), batches, strict=False):
        ids_BT = pad_right([row.ids for row in rows], tokenizer.pad_token_id)
        labels_BT = pad_right([[-100] * row.prompt_length + row.ids[row.prompt_length :] for row in rows], -100)
        recent.append(advance(policy(input_ids=ids_BT, labels=labels_BT).loss, policy, optimizer, schedule))
        report("policy", step, recent)
    return policy.eval()


def report(name: str, step: int, recent: list[float]) -> None:
    """Says the mean loss of the last hundred steps, and forgets them."""
    if (step + 1) % 100 == 0:
        say(f"{name} step {step + 1}: loss {np.mean(recent):.3f}")
        recent.clear()


def llama_config(tokenizer: PreTrainedTokenizerFast, **shape: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )


class Row(NamedTuple):
    ids: list[int]
    prompt_length: int


def dialogue_batches(
    tokenizer: PreTrainedTokenizerFast, size: int, rng: Random, kinds: Sequence[str] | None
) -> Iterator[list[Row]]:
    """Batches of like lengths, for ever: pools of 64 batches, sorted by length, their batches in random order.

    Prompt and reply are encoded together; that they part at the same token is what the pre-tokenizer's leading space is for.
    """
    while True:
        dialogues = list(corpus.dialogues(64 * size, rng.getrandbits(62), kinds=kinds))
        whole = encode(tokenizer, (d.prompt + d.completion for d in dialogues))
        starts_at = map(len, encode(tokenizer, (d.prompt for d in dialogues)))
        rows = [Row([*ids, tokenizer.eos_token_id], start) for ids, start in zip(whole, starts_at, strict=True)]
        rows.sort(key=lambda row: len(row.ids))
        starts = list(range(0, len(rows), size))
        rng.shuffle(starts)
        yield from (rows[start : start + size] for start in starts)


def adam(model: torch.nn.Module, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW with a short warm-up and a cosine down to a fiftieth of the rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        progress = max(0, step - warm) / max(1, steps - warm)
        return min((step + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, progress))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def advance(loss: torch.Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> float:
    """Takes one step and returns the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


# --- reward model ---


class Ranked(NamedTuple):
    """Replies to one prompt as token ids, and the judge's score of each."""

    rows: list[list[int]]
    scores: list[float]


def train_reward(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForSequenceClassification:
    """A Llama with one score, trained by Bradley-Terry on noisily labelled pairs of replies to the same prompt."""
    config = llama_config(tokenizer, hidden_size=128, num_hidden_layers=3, intermediate_size=352, num_labels=1)
    reward = LlamaForSequenceClassification(config)
    with torch.no_grad():  # words, at least, need not be learned anew
        reward.model.embed_tokens.weight.copy_(policy.model.embed_tokens.weight)
    say(f"reward: {reward.num_parameters():,} parameters, {recipe.reward_steps} steps")
    own = policy_groups(policy, tokenizer, recipe.sampled_prompts, recipe.replies, recipe.seed + 2)
    optimizer, schedule = adam(reward, recipe.reward_rate, recipe.reward_steps)
    rng = Random(recipe.seed + 3)
    noise = np.random.default_rng(recipe.seed + 4)
    recent: list[float] = []
    for step in range(recipe.reward_steps):
        half = recipe.reward_batch // 2
        groups = generator_groups(tokenizer, half, recipe.replies, rng) + rng.sample(own, min(half, len(own)))
        loss = bradley_terry(reward, groups, tokenizer.pad_token_id, recipe.label_sharpness, noise)
        recent.append(advance(loss, reward, optimizer, schedule))
        report("reward", step, recent)
    return reward.eval()


def bradley_terry(
    reward: LlamaForSequenceClassification, groups: Sequence[Ranked], pad: int, sharpness: float, noise: np.random.Generator
) -> torch.Tensor:
    """The mean of -log sigmoid(r_winner - r_loser) over all pairs of each group; winners are drawn, not certain."""
    flat = [row for group in groups for row in group.rows]
    scores_GR = np.array([group.scores for group in groups])
    rewards_GR = score_rows(reward, flat, pad).view(scores_GR.shape)
    left, right = np.triu_indices(scores_GR.shape[1], 1)
    gap_GP = scores_GR[:, left] - scores_GR[:, right]
    wins_GP = noise.random(gap_GP.shape) < 1 / (1 + np.exp(-sharpness * gap_GP))
    sign_GP = torch.from_numpy(np.where(wins_GP, 1.0, -1.0).astype(np.float32))
    kept_GP = torch.from_numpy((np.abs(gap_GP) > 1e-9).astype(np.float32))
    losses_GP = torch.nn.functional.softplus(-sign_GP * (rewards_GR[:, left] - rewards_GR[:, right]))
    return (losses_GP * kept_GP).sum() / kept_GP.sum().clamp(min=1.0)


def score_rows(reward: LlamaForSequenceClassification, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    ids_BT = pad_right(rows, pad)
    scores: torch.Tensor = reward(input_ids=ids_BT, attention_mask=(ids_BT != pad).long()).logits[:, 0]
    return scores


def ranked(tokenizer: PreTrainedTokenizerFast, prompt: str, completions: Sequence[str]) -> Ranked:
    scores = judge([prompt] * len(completions), completions)
    return Ranked(encode(tokenizer, (prompt + text for text in completions)), [float(score or 0.0) for score in scores])


def generator_groups(tokenizer: PreTrainedTokenizerFast, n: int, replies: int, rng: Random) -> list[Ranked]:
    """For each of `n` prompts: replies of different kinds, one good for certain, and one of them damaged."""
    groups = []
    for prompt in corpus.prompts("train", n, rng.getrandbits(62)):
        request = corpus.read_request(prompt)
        assert request is not None, prompt
        kinds = ["good", *rng.choices(list(corpus.KINDS), k=replies - 2)]
        texts = [corpus.reply(request, rng, [kind]).completion for kind in kinds]
        groups.append(ranked(tokenizer, prompt, [*texts, damage(rng.choice(texts), rng)]))
    return groups


def damage(text: str, rng: Random) -> str:
    """The reply with a fault that a policy could learn to make: said twice, out of order, cut short, or a word lost."""
    sentences = text.replace("! ", "!|").replace(". ", ".|").replace("? ", "?|").strip().split("|")
    words = text.split()
    faults = (
        lambda: " ".join(sentences + sentences[-1:]),
        lambda: " ".join(sentences[:1] + sentences),
        lambda: " ".join(rng.sample(words, len(words))),
        lambda: " ".join(words[: max(1, len(words) * 2 // 3)]),
        lambda: " ".join(word for word in words if rng.random() > 0.15),
        lambda: " ".join(sentences[:-1]),
    )
    return " " + rng.choice(faults)()


def policy_groups(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, replies: int, seed: int
) -> list[Ranked]:
    """The policy's own replies to `n` training prompts, ranked by the judge."""
    prompts = corpus.prompts("train", n, seed)
    completions = sample(policy, tokenizer, prompts, replies, seed)
    return [ranked(tokenizer, prompt, texts) for prompt, texts in zip(prompts, completions, strict=True)]


@torch.no_grad()
def sample(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], k: int, seed: int, batch: int = 64
) -> list[list[str]]:
    """`k` replies to each prompt at temperature 1."""
    torch.manual_seed(seed)
    found: list[list[str]] = []
    for start in range(0, len(prompts), batch):
        chosen = list(prompts[start : start + batch])
        inputs = tokenizer(chosen, return_tensors="pt", padding=True, padding_side="left")
        ids = policy.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_k=0,
            num_return_sequences=k,
            max_new_tokens=80,
        )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [texts[i * k : (i + 1) * k] for i in range(len(chosen))]
        if start // batch % 4 == 0:
            say(f"sampled {start + len(chosen)} of {len(prompts)} prompts")
    return found


# --- what was reached ---


@torch.no_grad()
def measure(
    policy: LlamaForCausalLM, reward: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, seed: int, n: int = 120
) -> dict[str, float]:
    """Facts about the models on held-out prompts: the judge's mean, pairwise accuracy, correlation with the judge."""
    prompts = corpus.prompts("heldout", n, seed)
    samples = sample(policy, tokenizer, prompts, 8, seed)
    own = [ranked(tokenizer, prompt, texts) for prompt, texts in zip(prompts, samples, strict=True)]
    scores_NK = np.array([group.scores for group in own])
    rewards_NK = np.array([score_rows(reward, group.rows, tokenizer.pad_token_id).numpy() for group in own])
    picked = scores_NK[np.arange(n), rewards_NK.argmax(1)]
    good, bad = good_and_bad(prompts, seed)
    better = [score_texts(reward, tokenizer, prompts, texts) for texts in (good, bad)]
    found = {
        "judge_mean_of_policy": scores_NK.mean(),
        "judge_mean_of_best_of_8_by_reward_model": picked.mean(),
        "judge_mean_of_best_of_8_by_judge": scores_NK.max(1).mean(),
        "reward_accuracy_polite_over_rude": (better[0] > better[1]).mean(),
        "reward_accuracy_on_policy_pairs": pair_accuracy(scores_NK, rewards_NK),
        "reward_correlation_with_judge": np.corrcoef(scores_NK.ravel(), rewards_NK.ravel())[0, 1],
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def good_and_bad(prompts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """For each prompt a good reply and one that is not: rude, curt, rambling, wrong or empty."""
    rng = Random(seed)
    pairs = []
    for prompt in prompts:
        request = corpus.read_request(prompt)
        assert request is not None, prompt
        kind = rng.choice([name for name in corpus.KINDS if name not in ("good", "half_polite", "advice")])
        pairs.append((corpus.reply(request, rng, ["good"]).completion, corpus.reply(request, rng, [kind]).completion))
    return [a for a, _ in pairs], [b for _, b in pairs]


def score_texts(
    reward: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], completions: Sequence[str]
) -> np.ndarray:
    rows = encode(tokenizer, (p + c for p, c in zip(prompts, completions, strict=True)))
    return np.asarray(score_rows(reward, rows, tokenizer.pad_token_id).detach().numpy())


def pair_accuracy(scores_NK: np.ndarray, rewards_NK: np.ndarray) -> float:
    """The share of pairs inside a group, with different judge's scores, that the reward model orders alike."""
    left, right = np.triu_indices(scores_NK.shape[1], 1)
    gap = scores_NK[:, left] - scores_NK[:, right]
    told = rewards_NK[:, left] - rewards_NK[:, right]
    differ = np.abs(gap) > 1e-9
    return float((np.sign(gap[differ]) == np.sign(told[differ])).mean())


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Half-precision weights, declared as float32: half the bytes, and whoever loads them computes in full precision."""
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
