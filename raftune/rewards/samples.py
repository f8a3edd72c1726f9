"""From the ledger's rows to what a reward is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.types as kinds

from raftune.pictures import Pictures
from raftune.records import INVALID, Part, Prompt, Score, Status
from raftune.rewards.batch import RESERVED, Batch
from raftune.rewards.combining import Combine, combined
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

    def score_samples(
        self, prompts: list[Prompt], samples: pa.Table, earlier: Mapping[int, Score] | None = None
    ) -> list[Score]:
        """Scores of the samples, row for row; prompts[i] is what row i answers.

        No reward is asked about a sample that its policy calls invalid: it has that status, and the reason as detail.
        Nor about one with an `earlier` score, by its row: its parts are combined with those of the others.
        """
        invalid = INVALID in samples.column_names and samples.column(INVALID).null_count < samples.num_rows
        if not invalid and not earlier:
            scores = self._asked(prompts, samples)
            self.extras = self.panel.extras
            return scores
        why = samples.column(INVALID).to_pylist() if invalid else [None] * samples.num_rows
        known = {row: score for row, score in (earlier or {}).items() if why[row] is None}
        rows = [row for row, reason in enumerate(why) if reason is None and row not in known]
        asked = self._asked([prompts[row] for row in rows], samples.take(pa.array(rows, pa.int64()))) if rows else []
        extras = self.panel.extras if rows else Extras()
        columns = {
            name: [dict(zip(rows, values, strict=True)).get(row) for row in range(len(why))]
            for name, values in extras.columns.items()
        }
        self.extras = replace(extras, columns=columns)
        found = dict(zip(rows, asked, strict=True))
        if known:
            found = self._together(found | known, prompts)
        return [found.get(row) or unfit(self.names, str(reason)) for row, reason in enumerate(why)]

    def _together(self, scores: Mapping[int, Score], prompts: list[Prompt]) -> dict[int, Score]:
        """The scores with their parts combined anew: a rank is one among all samples of a prompt."""
        rows = sorted(scores)
        parts = [scores[row].parts for row in rows]
        found = combined(parts, self.panel.shares, self.combine, [prompts[row].id for row in rows])
        return {row: replace(score, detail=scores[row].detail) for row, score in zip(rows, found, strict=True)}

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
