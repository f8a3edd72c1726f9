"""Prompts and answers become the ids that the tokenizer itself gives: no special token twice, no prefix to tune on."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

from raftune.config.sampling import SamplingConfig
from raftune.errors import DataError, TooLong
from raftune.policies.causal_lm.encoding import TextEncoder
from raftune.records import Prompt
from tests.builders import BOS, EOS, tiny_tokenizer

CHAT = [{"role": "user", "content": "the cab"}]


def encoder(tokenizer: Any = None, context: int | None = 32, **sampling: Any) -> TextEncoder:
    return TextEncoder(tokenizer or tiny_tokenizer(), SamplingConfig(**sampling), context, EOS)


def ids_of(encoder_: TextEncoder, content: Any, *, for_drawing: bool = True) -> list[int]:
    return encoder_.encode([Prompt("p", content)], for_drawing=for_drawing)[0]


def test_a_text_is_tokenised_as_the_tokenizer_does_it() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    assert ids_of(encoder(tokenizer), "the cab") == tokenizer("the cab")["input_ids"]
    assert ids_of(encoder(tokenizer), "the cab")[0] == BOS


def test_a_text_that_brings_its_own_bos_does_not_get_a_second_one() -> None:
    ids = ids_of(encoder(tiny_tokenizer(bos=True)), "<s>the cab")
    assert ids.count(BOS) == 1
    assert ids == ids_of(encoder(tiny_tokenizer(bos=True)), "the cab")


def test_an_eos_that_the_tokenizer_appends_is_left_out_and_one_in_the_text_is_kept() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    assert tokenizer("the cab")["input_ids"][-1] == EOS
    assert EOS not in ids_of(encoder(tokenizer), "the cab")
    assert ids_of(encoder(tiny_tokenizer()), "the cab</s>")[-1] == EOS


def test_many_prompts_of_both_kinds_keep_their_places() -> None:
    tokenizer = tiny_tokenizer(bos=True, chat=True)
    contents: list[Any] = ["a", CHAT, "the", CHAT, "ab"]
    together = encoder(tokenizer).encode([Prompt(str(i), c) for i, c in enumerate(contents)], for_drawing=True)
    assert together == [ids_of(encoder(tokenizer), c) for c in contents]


def test_messages_go_through_the_chat_template_with_a_generation_prompt() -> None:
    tokenizer = tiny_tokenizer(bos=True, chat=True)
    ids = ids_of(encoder(tokenizer), CHAT)
    assert tokenizer.decode(ids) == "<|user|>the cab</s><|assistant|>"
    assert BOS not in ids  # the template writes special tokens itself


def test_chat_template_kwargs_reach_the_template() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    assert tokenizer.decode(ids_of(encoder(tokenizer, chat_template_kwargs={"loud": True}), CHAT)).endswith("!")


def test_an_assistant_message_at_the_end_is_continued() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    text = tokenizer.decode(ids_of(encoder(tokenizer), [*CHAT, {"role": "assistant", "content": "so"}]))
    assert text.endswith("<|assistant|>so")


def test_messages_without_a_template_are_refused_with_the_fix() -> None:
    with pytest.raises(DataError, match=r"prompt p.*tokenizer\.chat_template"):
        ids_of(encoder(), CHAT)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"content": "x"}]])
def test_malformed_messages_are_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(DataError, match="a role and a content"):
        ids_of(encoder(tiny_tokenizer(chat=True)), messages)


def test_what_a_template_raises_names_the_prompt() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"refused prompt p \('the cab'\): no system role"):
        ids_of(encoder(tokenizer), CHAT)


def test_a_prefix_is_for_generation_only() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    prefixed = encoder(tokenizer, context=64, system_prompt="Be kind.", few_shot_prefix="Q: hi A: ho ")
    assert ids_of(prefixed, "Q: the") == tokenizer("Be kind.\n\nQ: hi A: ho Q: the")["input_ids"]
    assert ids_of(prefixed, "Q: the", for_drawing=False) == tokenizer("Q: the")["input_ids"]


def test_a_system_prompt_is_a_system_message_before_messages_and_joins_one_that_is_there() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    kind = encoder(tokenizer, context=128, system_prompt="Be kind.")
    assert tokenizer.decode(ids_of(kind, CHAT)).startswith("<|system|>Be kind.</s><|user|>")
    assert "system" not in tokenizer.decode(ids_of(kind, CHAT, for_drawing=False))
    brief = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert tokenizer.decode(ids_of(kind, brief)).startswith("<|system|>Be kind.\n\nBe brief.</s><|user|>")


def test_a_few_shot_prefix_before_messages_is_refused() -> None:
    with pytest.raises(DataError, match="few_shot_prefix"):
        ids_of(encoder(tiny_tokenizer(chat=True), few_shot_prefix="x"), CHAT)


def test_a_prompt_that_fills_the_context_is_refused_by_name_and_one_token_less_is_not() -> None:
    assert len(ids_of(encoder(context=8), "x" * 7)) == 7
    with pytest.raises(DataError, match=r"prompt p \('xxxxxxxx'\) has 8 tokens, the limit is 7"):
        ids_of(encoder(context=8), "x" * 8)
    assert len(ids_of(encoder(context=None), "x" * 500)) == 500


def test_a_prompt_over_max_prompt_length_is_refused() -> None:
    assert len(ids_of(encoder(max_prompt_length=5), "x" * 5)) == 5
    with pytest.raises(DataError, match=r"sampling\.max_prompt_length.*has 6 tokens, the limit is 5"):
        ids_of(encoder(max_prompt_length=5), "x" * 6)


def test_an_empty_prompt_is_bos_and_refused_where_there_is_no_bos() -> None:
    assert ids_of(encoder(tiny_tokenizer()), "") == [BOS]
    bare = tiny_tokenizer()
    bare.bos_token = None
    with pytest.raises(DataError, match="at least one token"):
        ids_of(encoder(bare), "")


def test_a_prompt_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError, match="a text or a list of messages here; got 3"):
        ids_of(encoder(), 3)


@pytest.mark.parametrize("answer", ["the end", [{"role": "assistant", "content": "the end"}]])
def test_a_completion_is_tokenised_without_special_tokens_and_ends_in_eos(answer: Any) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    text, ids = encoder(tokenizer).encode_answer(Prompt("p", "x"), answer)
    assert text == "the end"
    assert ids == [*tokenizer("the end", add_special_tokens=False)["input_ids"], EOS]


@pytest.mark.parametrize("answer", [None, 3, [], [{"role": "user", "content": "x"}], [{"role": "assistant"}]])
def test_a_completion_of_another_kind_is_refused(answer: Any) -> None:
    with pytest.raises(DataError, match="prompt p"):
        encoder().encode_answer(Prompt("p", "x"), answer)


def test_a_completion_longer_than_the_context_is_refused() -> None:
    with pytest.raises(DataError, match="context of 8 tokens; one to prompt p has 9"):
        encoder(context=8).encode_answer(Prompt("p", "x"), "x" * 8)


def test_decoding_leaves_special_tokens_out() -> None:
    tokenizer = tiny_tokenizer()
    assert encoder(tokenizer).decode([[*tokenizer("the cab")["input_ids"], EOS], [EOS]]) == ["the cab", ""]


def test_a_completion_is_cut_to_what_prompt_limit_and_context_leave_and_has_no_eos_then() -> None:
    answer = "xyz" * 4  # twelve tokens and EOS
    for context, limit, room in ((32, 8, 5), (10, 20, 7), (None, 6, 3)):
        text, ids, cut = encoder(context=context).encode_within(Prompt("p", "123"), answer, limit)
        assert (text, len(ids), cut) == (answer[:room], room, True)
        assert EOS not in ids
    whole = encoder(context=16).encode_within(Prompt("p", "123"), answer, None)
    assert whole == (*encoder(context=16).encode_answer(Prompt("p", "123"), answer), False)


def test_a_prompt_that_leaves_no_room_within_the_limit_is_too_long() -> None:
    with pytest.raises(TooLong, match="the prompt has 3 tokens and leaves no room for a completion within 3"):
        encoder(context=32).encode_within(Prompt("p", "123"), "x", 3)


def test_a_template_whose_loops_do_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftune.data.classifier_inputs.TEMPLATE_SECONDS", 0.2)
    tokenizer = tiny_tokenizer(chat=True)
    template = tokenizer.chat_template
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loops + template
    with pytest.raises(DataError, match=r"refused prompt p .*not done after 0\.2 seconds: its loops are too long"):
        ids_of(encoder(tokenizer), CHAT)
    tokenizer.chat_template = template
    assert ids_of(encoder(tokenizer), CHAT)


PARTED = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_parts_of_a_message_are_rendered_or_refused_and_never_written_as_python_shows_them() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    with pytest.raises(DataError, match="as Python shows"):
        ids_of(encoder(tokenizer, 200), [{"role": "user", "content": PARTS}])
    tokenizer.chat_template = PARTED
    for system in ([], [{"role": "system", "content": PARTS[:1]}]):
        rendered = encoder(tokenizer, 200, system_prompt="x")
        if system:
            assert tokenizer.decode(ids_of(rendered, [*system, {"role": "user", "content": PARTS}])) == "x\n\naab"
        else:
            assert ids_of(encoder(tokenizer, 200), [{"role": "user", "content": PARTS}]) == tokenizer("ab").input_ids


def test_an_image_in_a_message_is_refused_where_only_text_is_read() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "a"}]
    with pytest.raises(DataError, match="text alone"):
        ids_of(encoder(tiny_tokenizer(chat=True), 200), [{"role": "user", "content": content}])
