"""The reward model: ranked replies of the generator and of the policy, and the Bradley-Terry loss on their pairs."""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from raftune.starters.text import corpus
from raftune.starters.text.judge import judge
from tools.starters.optimizer import Optimizer, emit
from tools.starters.text.training import encode, pad_right, sample


class TextRewardRecipe(NamedTuple):
    """Every number that shapes the reward model."""

    steps: int = 900
    rate: float = 1e-3
    prompts_a_step: int = 16
    replies: int = 6  # to each of them, ranked
    sampled_prompts: int = 1200  # prompts whose replies are the policy's own, half of them begun courteously
    heat: float = 1.3  # the temperature of those, so that their advice goes wrong as a trained policy's may
    sharpness: float = 4.0  # P(reply i is labelled better than j) = sigmoid(sharpness * (judge_i - judge_j))


class RankedReplies(NamedTuple):
    """Replies to one prompt, encoded with it, and the judge's score of each."""

    rows: list[list[int]]
    scores: list[float]


def train_reward(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: TextRewardRecipe, seed: int
) -> LlamaForSequenceClassification:
    """The policy's body with one score for a head, trained on noisily labelled pairs of replies to the same prompt."""
    shape = {name: value for name, value in policy.config.to_dict().items() if name not in ("id2label", "label2id")}
    reward = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1))
    reward.model.load_state_dict(policy.model.state_dict())
    half = recipe.sampled_prompts // 2
    own = policy_groups(policy, tokenizer, corpus.prompts("train", half, seed), recipe.replies, seed)
    own += courteous_groups(policy, tokenizer, corpus.prompts("train", half, seed + 3), recipe, seed + 3)
    emit(f"reward: {reward.num_parameters():,} parameters, {recipe.steps} steps")
    torch.manual_seed(seed)
    descent = Optimizer("reward", reward, recipe.rate, recipe.steps)
    rng, noise = Random(seed + 1), np.random.default_rng(seed + 2)
    for _ in range(recipe.steps):
        made = generator_groups(tokenizer, recipe.prompts_a_step // 2, recipe.replies, rng)
        groups = made + rng.sample(own, min(len(made), len(own)))
        descent.advance(bradley_terry(reward, groups, tokenizer.pad_token_id, recipe.sharpness, noise))
    return reward.eval()


def bradley_terry(
    reward: LlamaForSequenceClassification,
    groups: Sequence[RankedReplies],
    pad: int,
    sharpness: float,
    noise: np.random.Generator,
) -> torch.Tensor:
    """The mean of -log sigmoid(r_winner - r_loser) over all pairs of each group; winners are drawn, ties left out."""
    scores_GR = np.array([group.scores for group in groups])
    rewards_GR = score_rows(reward, [row for group in groups for row in group.rows], pad).view(scores_GR.shape)
    left, right = np.triu_indices(scores_GR.shape[1], 1)
    gap_GP = scores_GR[:, left] - scores_GR[:, right]
    wins_GP = noise.random(gap_GP.shape) < 1 / (1 + np.exp(-sharpness * gap_GP))
    sign_GP = torch.from_numpy(np.where(wins_GP, 1.0, -1.0).astype(np.float32))
    kept_GP = torch.from_numpy((np.abs(gap_GP) > 1e-9).astype(np.float32))
    losses_GP = torch.nn.functional.softplus(-sign_GP * (rewards_GR[:, left] - rewards_GR[:, right]))
    return (losses_GP * kept_GP).sum() / kept_GP.sum().clamp(min=1.0)


def score_rows(reward: LlamaForSequenceClassification, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """One score a row; rows of like length are computed together, since padding costs as much as words."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores: list[torch.Tensor] = []
    for start in range(0, len(order), 32):
        ids_BT = pad_right([rows[i] for i in order[start : start + 32]], pad)
        scores.append(reward(input_ids=ids_BT, attention_mask=(ids_BT != pad).long()).logits[:, 0])
    return torch.cat(scores)[np.argsort(order)]


def ranked(tokenizer: PreTrainedTokenizerFast, prompt: str, completions: Sequence[str]) -> RankedReplies:
    scores = judge([prompt] * len(completions), completions)
    return RankedReplies(
        encode(tokenizer, (prompt + text for text in completions)), [float(score or 0.0) for score in scores]
    )


def policy_groups(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], replies: int, seed: int
) -> list[RankedReplies]:
    """The policy's own replies to the prompts, ranked by the judge."""
    completions = sample(policy, tokenizer, prompts, replies, seed)
    return [ranked(tokenizer, prompt, texts) for prompt, texts in zip(prompts, completions, strict=True)]


def courteous_groups(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    recipe: TextRewardRecipe,
    seed: int,
) -> list[RankedReplies]:
    """The policy's replies after an opener that was given to it: what it will say once it has learnt to be polite."""
    rng = Random(seed)
    openers = [" " + corpus.opener(request, rng) for request in map(corpus.read_request, prompts) if request]
    begun = [prompt + opener for prompt, opener in zip(prompts, openers, strict=True)]
    rests = sample(policy, tokenizer, begun, recipe.replies, seed, recipe.heat)
    whole = [[opener + rest for rest in texts] for opener, texts in zip(openers, rests, strict=True)]
    return [ranked(tokenizer, prompt, texts) for prompt, texts in zip(prompts, whole, strict=True)]


def generator_groups(tokenizer: PreTrainedTokenizerFast, n: int, replies: int, rng: Random) -> list[RankedReplies]:
    """For each of `n` training prompts: a good reply, two that differ from it in their advice, one damaged, others."""
    groups = []
    for prompt in corpus.prompts("train", n, rng.getrandbits(62)):
        request = corpus.read_request(prompt)
        assert request is not None, prompt
        kinds = rng.choices(list(corpus.KINDS), k=replies - 4)
        texts = [corpus.reply(request, rng, [kind]).completion for kind in kinds]
        texts += contrasts(request, rng)
        groups.append(ranked(tokenizer, prompt, [*texts, damage(rng.choice(texts), rng)]))
    return groups


def contrasts(request: corpus.Request, rng: Random) -> list[str]:
    """Three replies that differ in their advice alone: right, another topic's, and garbled from two pieces."""
    opener, closer = corpus.opener(request, rng), corpus.closer(request, rng)
    right, second = rng.sample(request.advice, 2)
    topics = corpus.DOMAINS[request.domain].topics
    other = request._replace(topic=rng.choice([topic for topic in topics if topic != request.topic]))
    false = rng.choice(other.advice)
    return [f" {opener} {text} {closer}" for text in (right, false, garble(right, rng.choice((second, false)), rng))]


def garble(left: str, right: str, rng: Random) -> str:
    """The beginning of one sentence and the end of the other."""
    head, tail = left.split(), right.split()
    return " ".join(head[: rng.randrange(1, len(head) - 1)] + tail[rng.randrange(1, len(tail) - 1) :])


def damage(text: str, rng: Random) -> str:
    """The reply with a fault that a policy could learn to make: said twice, shuffled, cut short, or words lost."""
    sentences = text.replace("! ", "!|").replace(". ", ".|").replace("? ", "?|").strip().split("|")
    words = text.split()
    faults = (
        lambda: [*sentences, sentences[-1]],
        lambda: [sentences[0], *sentences],
        lambda: sentences[:-1],
        lambda: rng.sample(words, len(words)),
        lambda: words[: max(1, len(words) * 2 // 3)],
        lambda: [word for word in words if rng.random() > 0.15],
    )
    return " " + " ".join(rng.choice(faults)())
