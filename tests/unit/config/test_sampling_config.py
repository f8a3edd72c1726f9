from __future__ import annotations

import pytest

from raftune.config import EngineConfig, SamplingConfig


@pytest.mark.parametrize(
    ("given", "field"),
    [("num_return_sequences", "num_generations"), ("max_new_tokens", "max_completion_length"), ("top_p", "top_p")],
)
def test_an_option_of_ours_among_generation_kwargs_is_refused_and_its_field_named(given: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"generation_kwargs must not hold '{given}'.*sampling\.{field}\."):
        SamplingConfig(generation_kwargs={given: 1})


def test_what_only_generate_has_passes() -> None:
    assert SamplingConfig(generation_kwargs={"num_beams": 4}).generation_kwargs == {"num_beams": 4}


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(ValueError, match="stop must hold non-empty texts"):
        SamplingConfig(stop=("",))


def test_a_backend_and_an_engine_may_be_a_kind_with_its_options() -> None:
    section = {"kind": "mine.py:Mine", "options": {"size": 3}}
    assert SamplingConfig(backend=section) == SamplingConfig(backend="mine.py:Mine", backend_options={"size": 3})  # type: ignore[arg-type]
    assert EngineConfig.model_validate("local") == EngineConfig()
    with pytest.raises(ValueError, match=r"sampling\.backend\.size is not a field; there are kind, options"):
        SamplingConfig(backend={"kind": "mine.py:Mine", "size": 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sampling\.backend\.size is not a field; there are args, concurrency"):
        SamplingConfig(backend={"kind": "auto", "size": 3})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"engine\.options are those of a custom engine; got size with engine\.kind 'local'"
    ):
        EngineConfig(options={"size": 3})
