"""Stage `parity`: chooses the generation backend by a trial on the run's prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from raftune.protocols import PolicyProvider, SingleStage, StageInputs, SupportsBackends
from raftune.stages.plan import left_out
from raftune.stages.prompt_check import prompts_in
from raftune.store.committed import read_json
from raftune.store.files import dump_json

PARITY, BACKEND = "parity", "backend.json"
_TRIED = 4  # prompts


class ParityStage(SingleStage):
    """backend.json: the trial's result, by which every round and every process generates the same way."""

    name = writes = PARITY

    def __init__(
        self, policies: PolicyProvider, release: Callable[[], None], drop: bool = False, *, options: tuple[str, ...]
    ) -> None:
        """`release` frees the model afterwards, where others generate. `drop`: unusable prompts are left out. `options`
        are the dotted fields of the backend's options that enter the key."""
        self.policies, self.release = policies, release
        self.fields = ("sampling.backend", *options)
        self.reads = ("data@0", "model@0", *(("prompts@0",) if drop else ()))

    def run(self, inputs: StageInputs, out: Path) -> None:
        policy = self.policies.at(inputs["model@0"])
        assert isinstance(policy, SupportsBackends)  # the table of stages has made sure of it
        dropped = left_out(inputs)
        prompts = (prompt for prompt in prompts_in(inputs["data@0"]) if prompt.id not in dropped)
        dump_json(out / BACKEND, policy.choose_backend(list(islice(prompts, _TRIED))))
        self.release()


def read_backend(folder: Path) -> dict[str, Any] | None:
    """The trial's record; None where there was none."""
    path = folder / BACKEND
    return dict(read_json(path)) if path.is_file() else None


def generation_words(
    record: Mapping[str, Any],
    probe: Mapping[str, Any] | None = None,
    mismatch: Mapping[str, Any] | None = None,
    *,
    distance: bool = True,
) -> str:
    """How a run generates, in a line: `record` is its backend.json, `probe` the parity.json of its newest adapter,
    `mismatch` that of its newest trained round (see SupportsMismatch).

    Raises KeyError, TypeError, ValueError for an invalid record.
    """
    compared = []
    if mismatch:
        mean, p99, tokens = (float(mismatch[name]) for name in ("mean", "p99", "tokens"))
        compared.append(
            f"recorded log-probabilities of the newest round {mean:.0e} nats a token from the trainer's "
            f"(99th percentile {p99:.0e}, {tokens:.0f} tokens)"
        )
    if "own" in record:
        return "; ".join([f"{record['own']}, a backend of your own", *compared])
    why = f" ({record['auto']})" if record.get("auto") else ""
    if (server := record.get("server")) is not None:
        names = {"vllm": "vLLM", "openai": "a server of version"}
        device = f" on the {server['device']}" if "device" in server else ""
        exact = "a seed gives the same bytes" if server["reproducible"] else "a repeated sample differs"
        name = f"{names.get(server['kind'], server['kind'])} {server['version']}, {server['dtype']}{device}"
        return "; ".join([name, f"{exact}{why}", *compared])
    backend = record.get("way") or ("forked" if not record["forked"] else "single" if record["rows"] else "generate")
    parts = ["shared prefix (a prompt is computed once for all of its completions)"]
    shared = backend in ("fused", "forked")
    if not shared:
        parts = [f"`generate`, slower than a shared prefix: {record.get('why') or record['forked']}"]
    parts[0] += f", {record['auto']}" if record.get("auto") else ""
    if distance and (nats := record["distances"].get(backend)) is not None:
        limit = float(record["allowed"])
        parts.append(f"{float(nats):.0e} nats a token from a plain forward on its own prompts, {limit:g} allowed")
    if shared and record.get("scoring"):
        parts.append("log-probabilities of completions row by row")
    if probe is not None:
        merged = "merged into the weights" if probe["merge"] else "beside the weights, whose 16 bits cannot hold it"
        parts.append(f"the adapter {merged}")
    return "; ".join([*parts, *compared])
