"""Stages `start` and `teacher`: check and record the initial models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from raftune.errors import ModelError
from raftune.protocols import SingleStage, StageInputs


class StartStage(SingleStage):
    """model/ of round 0 (or teacher/): a reference and its hash, or the weights of a model given as an object."""

    def __init__(
        self, start: Callable[[Path], object], *, name: str = "start", code: Mapping[str, str] | None = None
    ) -> None:
        """`code`: hashes of the code of a custom family."""
        self.start, self.name, self.code = start, name, dict(code or {})
        self.writes = "teacher" if name == "teacher" else "model"
        self.fields = ("sampling.teacher",) if name == "teacher" else ("policy",)

    def fingerprints(self) -> Mapping[str, str]:
        return self.code

    def run(self, inputs: StageInputs, out: Path) -> None:
        self.start(out)
        if not any(out.iterdir()):
            raise ModelError(
                "a family must write its start model into the folder `out`; it wrote nothing there. A file that says "
                "what the model is made from is enough."
            )
