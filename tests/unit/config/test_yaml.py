"""Whatever a YAML file holds, it is read as it stands or refused by its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from raftune.config.load import load_config, read_yaml
from raftune.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training: {learning_rate: 1.0}\nseed: 1\ntraining: {batch_size: 2}\n", 3),
        ("policy:\n  family: tabular\n  num_prompts: 4\n  num_prompts: 5\n", 4),
        ('seed: 1\n"seed": 1\n', 2),
    ],
)
def test_a_duplicate_name_is_refused_and_its_line_named(text: str, line: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"line {line} .*in line"):
        read_yaml(written(tmp_path, text))


def test_a_name_may_be_overridden_and_occur_in_several_sections(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\nc: {x: 4}\n"
    assert read_yaml(written(tmp_path, text)) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 4}}


@pytest.mark.parametrize("text", ["name: 2024-13-45\n", f"a: {'[' * 3000}{']' * 3000}\n", f"seed: {'9' * 5000}\n"])
def test_values_that_python_cannot_hold_are_refused_as_the_files(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_yaml(written(tmp_path, text))


def test_a_wrong_value_that_anchors_make_gigabytes_of_is_shown_in_short(tmp_path: Path) -> None:
    lines = ["data: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x{n}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(9)]
    with pytest.raises(ConfigError, match="data must be a section"):
        load_config([written(tmp_path, "\n".join(lines))])


@pytest.mark.parametrize("field", ["data.limit", "sampling.chunk_size", "evaluation.num_prompts", "num_rounds"])
def test_whole_numbers_that_nothing_can_count_to_are_refused_by_their_field(field: str, tmp_path: Path) -> None:
    path = written(tmp_path, "policy: {family: tabular, num_prompts: 4, num_answers: 5}\ndata: {prompts: x.jsonl}\n")
    with pytest.raises(ConfigError, match=rf"^{field} must be below"):
        load_config([path], {field: 10**30})
