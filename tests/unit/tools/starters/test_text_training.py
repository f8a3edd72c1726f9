"""How the starter's models are trained: reproducibly, on replies only, and towards the judge's order."""

from random import Random

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from raftune.starters.text import corpus
from raftune.starters.text.judge import judge
from tools.starters.optimizer import rate_factor
from tools.starters.text.build import TextPolicyRecipe, dialogue_batches, pair_accuracy, train_policy
from tools.starters.text.reward_training import (
    RankedReplies,
    TextRewardRecipe,
    bradley_terry,
    damage,
    generator_groups,
    score_rows,
    train_reward,
)
from tools.starters.text.training import train_tokenizer

pytestmark = pytest.mark.slow

TINY_POLICY = TextPolicyRecipe(steps=3, knowledge_steps=2, dialogues_a_step=4)
TINY_REWARD = TextRewardRecipe(steps=2, prompts_a_step=4, replies=5, sampled_prompts=4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    torch.set_num_threads(1)
    return train_tokenizer(d.prompt + d.completion for d in corpus.dialogues(2_000, 0))


def weights(tokenizer: PreTrainedTokenizerFast) -> list[torch.Tensor]:
    torch.manual_seed(7)
    policy = train_policy(tokenizer, TINY_POLICY, 1)
    reward = train_reward(policy, tokenizer, TINY_REWARD, 2)
    return [*policy.parameters(), *reward.parameters()]


def test_two_trainings_with_one_seed_give_the_same_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = weights(tokenizer), weights(tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batches_hold_prompt_reply_and_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in next(dialogue_batches(tokenizer, 8, Random(0), ["good"])):
        assert row.ids[-1] == tokenizer.eos_token_id
        assert corpus.read_request(tokenizer.decode(row.ids[: row.prompt_length], skip_special_tokens=True)) is not None
        assert tokenizer.decode(row.ids[row.prompt_length :]).startswith(" ")


def test_a_step_on_bradley_terry_raises_the_better_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    reward = train_reward(train_policy(tokenizer, TINY_POLICY, 1), tokenizer, TINY_REWARD, 2).train()
    rows = [
        tokenizer(text)["input_ids"] for text in ("User: Hi\nAssistant: Of course.", "User: Hi\nAssistant: Go away.")
    ]
    group = RankedReplies(rows, [4.0, 0.0])
    before = score_rows(reward, rows, tokenizer.pad_token_id).detach()
    optimizer = torch.optim.SGD(reward.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        bradley_terry(reward, [group], tokenizer.pad_token_id, 50.0, np.random.default_rng(0)).backward()
        optimizer.step()
    after = score_rows(reward, rows, tokenizer.pad_token_id).detach()
    assert after[0] - after[1] > before[0] - before[1]


def test_pairs_with_equal_scores_teach_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    reward = train_reward(train_policy(tokenizer, TINY_POLICY, 1), tokenizer, TINY_REWARD, 2)
    rows = [[1, 5, 6], [1, 7, 8]]
    loss = bradley_terry(
        reward, [RankedReplies(rows, [2.0, 2.0])], tokenizer.pad_token_id, 4.0, np.random.default_rng(0)
    )
    assert loss.item() == 0.0


def test_padding_does_not_change_a_score(tokenizer: PreTrainedTokenizerFast) -> None:
    reward = train_reward(train_policy(tokenizer, TINY_POLICY, 1), tokenizer, TINY_REWARD, 2)
    alone = score_rows(reward, [[1, 5, 6]], tokenizer.pad_token_id)
    beside = score_rows(reward, [[1, 5, 6], [1, 7, 8, 9, 10, 11]], tokenizer.pad_token_id)
    assert torch.allclose(alone[0], beside[0], atol=1e-5)


def test_a_damaged_good_reply_is_never_better(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(0)
    made = [corpus.reply(rng.choice(corpus.requests("train")), rng, ["good"]) for _ in range(300)]
    whole = judge([d.prompt for d in made], [d.completion for d in made])
    broken = judge([d.prompt for d in made], [damage(d.completion, rng) for d in made])
    lower = [b < w for w, b in zip(whole, broken, strict=True) if w is not None and b is not None]
    assert len(lower) == 300
    assert sum(lower) / 300 > 0.9


def test_every_ranked_group_holds_a_good_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    for group in generator_groups(tokenizer, 20, 5, Random(0)):
        assert len(group.rows) == len(group.scores) == 5
        assert max(group.scores) >= 2.5


def test_pair_accuracy_counts_only_pairs_that_the_judge_tells_apart() -> None:
    assert pair_accuracy(np.array([[0.0, 1.0, 1.0]]), np.array([[0.0, 2.0, -1.0]])) == 0.5


def test_the_rate_warms_up_and_falls_to_a_fiftieth() -> None:
    factors = [rate_factor(step, 1_000) for step in range(1_001)]
    assert factors[0] == 0.01
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(0.02)
