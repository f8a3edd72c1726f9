"""Stages `start` and `teacher`: check and record the initial models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from raftune.errors import ModelError
from raftune.protocols import StageInputs


class StartStage:
    """model/ of round 0 (or teacher/): a reference and its hash, or the weights of a model given as an object."""

    reads: tuple[str, ...] = ()

    def __init__(
        self, begin: Callable[[Path], object], *, name: str = "start", code: Mapping[str, str] | None = None
    ) -> None:
        self.begin, self.name, self.code = begin, name, dict(code or {})
        self.writes = "teacher" if name == "teacher" else "model"
        self.fields = ("sampling.teacher",) if name == "teacher" else ("policy",)

    def fingerprints(self) -> Mapping[str, str]:
        """The hash of code that is not the package's own: what follows is made by it."""
        return self.code

    def run(self, inputs: StageInputs, out: Path) -> None:
        self.begin(out)
        if not any(out.iterdir()):
            raise ModelError(
                "a family must write its start model into the folder `out`; it wrote nothing there. A file that says "
                "what the model is made from is enough."
            )
