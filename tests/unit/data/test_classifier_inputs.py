"""What a sequence classifier reads of a prompt and its completion."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from raftune.data.classifier_inputs import NOTES, ClassifierInputs, longest, read_notes, tokens, write_notes
from raftune.errors import RewardError
from tests.builders import BOS, EOS, PAD, encoder_tokenizer, tiny_tokenizer

READING = {"include_prompt": True, "append_eos": False, "add_special_tokens": True, "max_length": None}


def test_prompt_and_completion_are_one_text_with_one_end() -> None:
    tokenizer = tiny_tokenizer()
    whole = tokenizer("the ab", add_special_tokens=False)["input_ids"]
    assert tokens(tokenizer, "the a", "b", ClassifierInputs()) == whole
    assert tokens(tokenizer, "the a", "b", ClassifierInputs(append_eos=True)) == [*whole, EOS]
    assert tokens(tokenizer, "the a", "b</s>", ClassifierInputs(append_eos=True)) == [*whole, EOS]
    assert tokens(tokenizer, "the", "ab", ClassifierInputs(include_prompt=False)) == tokenizer("ab")["input_ids"]
    assert tokens(tokenizer, "", "", ClassifierInputs()) == [PAD]


def test_special_tokens_survive_the_cut_and_the_end_of_the_text_does() -> None:
    tokenizer = encoder_tokenizer(eos=False)
    tokenizer.truncation_side = "left"
    ids = tokens(tokenizer, "x" * 50, "yz", ClassifierInputs(special_tokens=True, limit=5))
    assert ids[0] == BOS and ids[-1] == EOS and tokenizer.decode(ids[1:-1]) == "xyz"


def test_positions_before_the_padding_tokens_are_none_in_roberta() -> None:
    tokenizer = tiny_tokenizer()
    config = SimpleNamespace(model_type="roberta", max_position_embeddings=514, pad_token_id=1)
    assert longest(tokenizer, config, None) == 512
    assert longest(tokenizer, config, 100) == 100
    assert longest(tokenizer, SimpleNamespace(model_type="llama", max_position_embeddings=256), 1024) == 256
    assert longest(tokenizer, SimpleNamespace(model_type="bloom"), None) is None


def test_notes_are_read_as_they_were_written_and_damage_is_named(tmp_path: Path) -> None:
    assert read_notes(tmp_path / NOTES) == {} and read_notes(None) == {}
    write_notes(tmp_path, {"reading": READING})
    assert read_notes(tmp_path / NOTES) == {"reading": READING}
    for damage in ("{", "[]", "{}", json.dumps({"reading": {"foreign": 1}})):
        (tmp_path / NOTES).write_text(damage)
        with pytest.raises(RewardError, match="is damaged: it says how the reward model reads its text"):
            read_notes(tmp_path / NOTES)
