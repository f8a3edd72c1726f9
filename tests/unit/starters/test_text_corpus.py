"""The generator: its splits, its determinism, and its judge."""

from random import Random

import pytest

from raftune.errors import DataError
from raftune.starters import text
from raftune.starters.text import corpus
from raftune.starters.text.corpus import CURT, DAYS, DIGRESSIONS, DOMAINS, RUDE
from raftune.starters.text.judge import MAXIMUM, judge, parts

PROMPT = corpus.as_prompt("How do I fix my bicycle?")
GOOD = " Happy to help with your bicycle! Clean the chain and put a drop of oil on each link. I hope this helps."


def score(completion: str, prompt: str = PROMPT) -> float:
    [value] = judge([prompt], [completion])
    assert value is not None
    return value


def means_by_kind(n: int = 60) -> dict[str, float]:
    rng = Random(5)
    found = {}
    for kind in corpus.KINDS:
        made = [corpus.reply(rng.choice(corpus.requests("heldout")), rng, [kind]) for _ in range(n)]
        found[kind] = sum(score(d.completion, d.prompt) for d in made) / n
    return found


def test_no_request_is_in_both_splits_and_every_topic_is_in_the_training_one() -> None:
    train, heldout = corpus.requests("train"), corpus.requests("heldout")
    assert not {r.text for r in train} & {r.text for r in heldout}
    assert {r.topic for r in train} == {topic for domain in DOMAINS.values() for topic in domain.topics}
    assert 0.1 < len(heldout) / (len(train) + len(heldout)) < 0.25
    assert {r.domain for r in heldout} == set(DOMAINS)


def test_prompts_are_distinct_in_their_split_and_a_function_of_the_seed() -> None:
    train, heldout = text.prompts("train", 512, 1), text.prompts("heldout", 128, 1)
    assert len(set(train)) == 512
    assert not set(train) & set(heldout)
    assert train == text.prompts("train", 512, 1) != text.prompts("train", 512, 2)
    assert all(corpus.read_request(p).split == "heldout" for p in heldout)  # type: ignore[union-attr]


def test_more_prompts_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match=r"n must be at most \d+ for the split 'heldout'; got 100000"):
        text.prompts("heldout", 100_000, 0)


def test_dialogues_are_a_function_of_the_seed() -> None:
    assert list(corpus.dialogues(50, 3)) == list(corpus.dialogues(50, 3)) != list(corpus.dialogues(50, 4))


def test_about_two_thirds_of_the_replies_are_bad() -> None:
    made = list(corpus.dialogues(3_000, 0))
    bad = sum(score(d.completion, d.prompt) < 0.5 * MAXIMUM for d in made) / len(made)
    assert 0.6 <= bad <= 0.75


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_request_is_read_back_from_its_prompt(split: corpus.Split) -> None:
    for request in corpus.requests(split):
        for greeting in corpus.GREETINGS:
            assert corpus.read_request(corpus.as_prompt(greeting + request.text)) == request


def test_no_template_is_left_unfilled() -> None:
    made = [d.prompt + d.completion for d in corpus.dialogues(4_000, 2)]
    assert not [line for line in made if "{" in line or "  " in line]


def test_the_judge_ranks_the_kinds_of_reply_as_a_person_would() -> None:
    means = means_by_kind()
    assert means["good"] > 0.88 * MAXIMUM
    assert means["good"] > means["half_polite"] > means["advice"] > means["empty_courtesy"] > means["rude_advice"]
    assert max(means["rude"], means["curt"], means["ramble"]) < 0.15 * MAXIMUM


def test_the_best_reply_has_the_full_score() -> None:
    assert score(GOOD) == MAXIMUM


@pytest.mark.parametrize("line", RUDE)
def test_every_rude_sentence_is_seen_as_rude(line: str) -> None:
    request = corpus.read_request(PROMPT)
    assert request is not None
    assert parts(request, GOOD + " " + line.format(r="your bicycle"))["courtesy"] == -1.0


@pytest.mark.slow
def test_no_good_reply_is_seen_as_rude() -> None:
    rng = Random(0)
    made = [corpus.reply(request, rng, ["good"]) for request in corpus.requests("train") for _ in range(3)]
    assert min(score(d.completion, d.prompt) for d in made) >= 2.5


@pytest.mark.parametrize(
    "worse",
    [
        GOOD + GOOD,
        GOOD.removesuffix("."),
        GOOD + " Please ask if anything is unclear. Have a lovely day! My pleasure! Of course!",
        GOOD + " " + DIGRESSIONS[0],
        GOOD.replace("Clean the chain", "Chain the clean").replace("drop of oil on", "on oil of drop"),
        " ".join(sorted(GOOD.split())),
        " bicycle chain oil link please happy glad hope" * 3,
        " Happy to help with your bicycle! Simmer the soup for half an hour and blend it. I hope this helps.",
    ],
)
def test_repeats_stuffing_digressions_salad_and_wrong_advice_cost_points(worse: str) -> None:
    assert score(worse) < 0.85 * score(GOOD)


@pytest.mark.parametrize("odd", ["", "   ", "\n", "...", "?!", "\x00", "日本語", "a" * 5_000, *CURT])
def test_empty_and_odd_replies_score_next_to_nothing(odd: str) -> None:
    assert 0.0 <= score(odd) < 0.1 * MAXIMUM


def test_messages_are_judged_by_their_last_content() -> None:
    prompt = [{"role": "user", "content": "How do I fix my bicycle?"}]
    assert judge([prompt], [[{"role": "assistant", "content": GOOD}]]) == [MAXIMUM]


def test_the_judge_does_not_apply_to_a_prompt_that_the_generator_did_not_make() -> None:
    assert judge(["User: What is love?\nAssistant:", PROMPT], [GOOD, GOOD], extra=[1, 2]) == [None, MAXIMUM]


def test_advice_for_another_day_is_not_quite_right() -> None:
    prompt = corpus.as_prompt("Please book the haircut for Friday.")
    right, wrong = (
        f" My pleasure! The salon has a free slot on {day} at four. See you then!" for day in ("Friday", DAYS[0])
    )
    assert score(right, prompt) > score(wrong, prompt)


def test_the_prompts_to_show_are_held_out() -> None:
    requests = [corpus.read_request(prompt) for prompt in text.SHOW]
    assert len({r.domain for r in requests if r}) == 3
    assert all(r is not None and r.split == "heldout" for r in requests)
