"""From the ledger's rows to what a reward is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.types as kinds

from raftune.pictures import Pictures
from raftune.records import INVALID, Part, Prompt, Score, Status
from raftune.rewards.batch import RESERVED, Batch
from raftune.rewards.combining import Combine
from raftune.rewards.panel import Extras, Panel


class SamplePanel:
    """A panel that reads samples as the ledger holds them."""

    def __init__(self, panel: Panel, combine: Combine | None = None) -> None:
        """`combine` is another way to combine the parts than the panel's own."""
        self.panel, self.names, self.combine = panel, panel.names, combine or panel.combine
        self.extras = Extras()

    @property
    def fingerprint(self) -> str:
        """Changes with the code, options and weights of any reward; worked out when first asked for."""
        return self.panel.fingerprint_by(self.combine)

    def score_samples(self, prompts: list[Prompt], samples: pa.Table) -> list[Score]:
        """Scores of the samples, row for row; prompts[i] is what row i answers.

        No reward is asked about a sample that its policy calls invalid: it has that status, and the reason as detail.
        """
        if INVALID not in samples.column_names or samples.column(INVALID).null_count == samples.num_rows:
            scores = self._asked(prompts, samples)
            self.extras = self.panel.extras
            return scores
        why = samples.column(INVALID).to_pylist()
        valid = [row for row, reason in enumerate(why) if reason is None]
        asked = self._asked([prompts[row] for row in valid], samples.take(pa.array(valid, pa.int64())))
        columns = {
            name: [dict(zip(valid, values, strict=True)).get(row) for row in range(len(why))]
            for name, values in self.panel.extras.columns.items()
        }
        self.extras = replace(self.panel.extras, columns=columns)
        valid_scores = dict(zip(valid, asked, strict=True))
        return [valid_scores.get(row) or unfit(self.names, str(reason)) for row, reason in enumerate(why)]

    def _asked(self, prompts: list[Prompt], samples: pa.Table) -> list[Score]:
        groups = [prompt.id for prompt in prompts]
        return self.panel.score(batch_of(prompts, samples), groups=groups, combine=self.combine)

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the rewards read the samples, each once."""
        return self.panel.notes()

    def close(self) -> None:
        self.panel.close()


def unfit(names: Sequence[str], why: str) -> Score:
    """The score of a sample that no reward was asked about."""
    return Score(None, Status.INVALID, dict.fromkeys(names, Part(None, Status.NOT_APPLICABLE)), why)


def batch_of(prompts: list[Prompt], samples: pa.Table) -> Batch:
    """Prompts and completions in TRL's shapes, each column of the data set as one value a sample."""
    answers = samples.column("completion")
    if kinds.is_binary(answers.type) or kinds.is_large_binary(answers.type):
        completions = cast("list[Any]", Pictures(answers, samples.column("sample_id")))
    else:
        completions = [as_asked(prompt, answer) for prompt, answer in zip(prompts, answers.to_pylist(), strict=True)]
    names = [name for name in (prompts[0].columns if prompts else ()) if name not in RESERVED]
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
    ids = samples.column("completion_ids").to_pylist() if "completion_ids" in samples.column_names else None
    return Batch([prompt.content for prompt in prompts], completions, columns, ids)


def as_asked(prompt: Prompt, answer: Any) -> Any:
    """A completion mirrors its prompt: text for text, a list of one assistant message for messages."""
    return [{"role": "assistant", "content": answer}] if isinstance(prompt.content, list) else answer
