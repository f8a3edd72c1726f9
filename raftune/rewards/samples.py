"""From the ledger's rows to what a reward is asked."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from raftune.records import Prompt, Score
from raftune.rewards.batch import RESERVED, Batch
from raftune.rewards.panel import Panel


class SamplePanel:
    """A panel that reads samples as the ledger holds them."""

    def __init__(self, panel: Panel) -> None:
        self.panel, self.names = panel, panel.names

    @property
    def fingerprint(self) -> str:
        """Changes with the code, options and weights of any reward; worked out when first asked for."""
        return self.panel.fingerprint

    def score_samples(self, prompts: list[Prompt], samples: pa.Table) -> list[Score]:
        """Scores of the samples, row for row; prompts[i] is what row i answers."""
        return self.panel.score(batch_of(prompts, samples))

    def close(self) -> None:
        self.panel.close()


def batch_of(prompts: list[Prompt], samples: pa.Table) -> Batch:
    """Prompts and completions in TRL's shapes, each column of the data set as one value a sample."""
    answers = samples.column("completion").to_pylist()
    completions = [as_asked(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    names = [name for name in (prompts[0].columns if prompts else ()) if name not in RESERVED]
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
    ids = samples.column("completion_ids").to_pylist() if "completion_ids" in samples.column_names else None
    return Batch([prompt.content for prompt in prompts], completions, columns, ids)


def as_asked(prompt: Prompt, answer: Any) -> Any:
    """A completion mirrors its prompt: text for text, a list of one assistant message for messages."""
    return [{"role": "assistant", "content": answer}] if isinstance(prompt.content, list) else answer
