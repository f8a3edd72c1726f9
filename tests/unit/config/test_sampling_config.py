from __future__ import annotations

import pytest

from raftune.config import SamplingConfig


@pytest.mark.parametrize(
    ("given", "field"),
    [("num_return_sequences", "num_generations"), ("max_new_tokens", "max_completion_length"), ("top_p", "top_p")],
)
def test_a_dial_of_ours_among_generation_kwargs_is_refused_and_its_field_named(given: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"generation_kwargs must not hold '{given}'.*sampling\.{field}\."):
        SamplingConfig(generation_kwargs={given: 1})


def test_what_only_generate_has_passes() -> None:
    assert SamplingConfig(generation_kwargs={"num_beams": 4}).generation_kwargs == {"num_beams": 4}


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(ValueError, match="stop must hold non-empty texts"):
        SamplingConfig(stop=("",))
