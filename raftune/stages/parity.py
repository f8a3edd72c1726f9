"""Stage `parity`: chooses the generation backend by a trial on the run's prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from raftune.protocols import PolicyProvider, StageInputs, SupportsBackends
from raftune.stages.plan import left_out
from raftune.stages.prompt_check import prompts_in
from raftune.store.committed import read_json
from raftune.store.files import dump_json

BACKEND = "backend.json"
TRIED = 4  # prompts


class ParityStage:
    """backend.json: what the trial found, so that every round and every process generate the same way."""

    name = writes = "parity"
    fields = ("sampling.backend", "sampling.backend_options")

    def __init__(self, policies: PolicyProvider, release: Callable[[], None], drop: bool = False) -> None:
        """`release` is called afterwards: it frees the model where other processes generate. `drop`: not tried on
        prompts that the run goes without."""
        self.policies, self.release = policies, release
        self.reads = ("data@0", "model@0", *(("prompts@0",) if drop else ()))

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...]:
        policy = self.policies.at(inputs["model@0"])
        assert isinstance(policy, SupportsBackends)  # the table of stages holds this one for no other
        gone = left_out(inputs)
        prompts = (prompt for prompt in prompts_in(inputs["data@0"]) if prompt.id not in gone)
        record = policy.choose_backend(list(islice(prompts, TRIED)))
        dump_json(out / BACKEND, record)
        self.release()
        return ()


def read_backend(folder: Path) -> dict[str, Any] | None:
    """What the trial found; None where it was not made."""
    path = folder / BACKEND
    return dict(read_json(path)) if path.is_file() else None


def generation_words(
    record: Mapping[str, Any], probe: Mapping[str, Any] | None = None, *, distance: bool = True
) -> str:
    """How a run generates, in a line: `record` is its backend.json, `probe` the parity.json of its newest adapter.

    Raises KeyError, TypeError, ValueError for a record that is none.
    """
    if "own" in record:
        return f"{record['own']}, a backend of your own"
    way = record.get("way") or ("forked" if not record["forked"] else "single" if record["rows"] else "generate")
    parts = ["shared prefix (a prompt is computed once for all of its completions)"]
    if way != "forked":
        parts = [f"`generate`, slower than a shared prefix: {record.get('why') or record['forked']}"]
    if distance and (nats := record["distances"].get(way)) is not None:
        limit = float(record["allowed"])
        parts.append(f"{float(nats):.0e} nats a token from a plain forward on its own prompts, {limit:g} allowed")
    if way == "forked" and record.get("scoring"):
        parts.append("log-probabilities of completions row by row")
    if probe is not None:
        merged = "merged into the weights" if probe["merge"] else "beside the weights, whose 16 bits cannot hold it"
        parts.append(f"the adapter {merged}")
    return "; ".join(parts)
