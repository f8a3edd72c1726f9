"""The processes that train one model together: who they are, what they agree on, and how a model is spread over them.

A fit asks `current()`. In a run without `training.processes` that is one process, for which everything here is the
identity.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.utils.data import Sampler

from raftune.errors import ConfigError, RaftuneError

TIMEOUT_MINUTES = 30  # after which a process that waits for another one gives up


class NotFirst(Exception):
    """Raised where a fit ends in a process that is not the first one: the first one alone writes the result."""


class SmallerBatches(RaftuneError):
    """Memory ran out in one of several processes: all have to start again, in the smaller batches on record."""


@dataclass(frozen=True)
class Processes:
    """This process's number, how many train together, and how: `ddp` (a whole model each) or `fsdp` (shards)."""

    rank: int = 0
    world: int = 1
    parallel: str = "ddp"

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.world > 1 and self.parallel == "fsdp"

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in float64 and the same in each."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def of_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process; the others do not call it."""
        value = [make() if self.first else None]
        if self.world > 1:
            distributed.broadcast_object_list(value, src=0)
        return value[0]

    def barrier(self) -> None:
        """Waits until every process is here."""
        self.total([0.0])

    def of_rank(self, name: str) -> str:
        """The name of a checkpoint's file; where processes hold shards, each has one of its own."""
        path = Path(name)
        return f"{path.stem}-{self.rank}{path.suffix}" if self.sharded else name


_current = Processes()


def current() -> Processes:
    return _current


@contextlib.contextmanager
def training_together(processes: Processes) -> Iterator[None]:
    """Inside the block, fits of this process are a part of a training by these processes."""
    global _current
    before, _current = _current, processes
    try:
        yield
    finally:
        _current = before


def shares(rows: int, accumulation: int, processes: int) -> tuple[int, int]:
    """Rows of a micro-batch and micro-batches of a step in each process, so that a step has as many rows as in one.

    Micro-batches are shared out as they are; where there are fewer than processes, each is cut into equal parts.
    Raises ConfigError where that does not come out even.
    """
    common = math.gcd(accumulation, processes)
    parts = processes // common
    if rows % parts:
        raise ConfigError(
            f"training.per_device_train_batch_size x gradient_accumulation_steps, the rows of a step, must be shared "
            f"evenly by training.processes = {processes}; got {rows} x {accumulation}. Set "
            f"gradient_accumulation_steps: {processes}, or a batch size that is a multiple of {parts}."
        )
    return rows // parts, accumulation // common


class BatchShare(Sampler[list[int]]):
    """One process's micro-batches of every step: of those that one process would take in turn, every world-th.

    A step at the end of an epoch with too few rows gives some processes a batch of the row `padding` alone, which
    counts for nothing: all processes have equally many batches. With `drop_last` a batch with too few rows is left out.
    """

    def __init__(
        self, order: Any, rows: int, accumulation: int, processes: Processes, padding: int, drop_last: bool = False
    ) -> None:
        self.order, self.rows, self.accumulation, self.padding = order, rows, accumulation, padding
        self.processes, self.drop_last = processes, drop_last

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self._batches()) / self.processes.world)

    def _batches(self) -> range:
        """The first row of each batch."""
        count = len(self.order)
        return range(0, count - count % self.rows if self.drop_last else count, self.rows)

    def __iter__(self) -> Iterator[list[int]]:
        order, world = list(self.order), self.processes.world
        batches = [order[first : first + self.rows] for first in self._batches()]
        batches += [[self.padding]] * (-len(batches) % world)
        yield from batches[self.processes.rank :: world]


class ObjectiveModule(torch.nn.Module):
    """A model whose forward is the loss of a batch: only around a forward do processes exchange gradients."""

    def __init__(self, model: Any, loss: Callable[[Mapping[str, torch.Tensor]], Any]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """The loss, and the sum of the coefficients behind it."""
        return self.loss(batch)


def spread(module: ObjectiveModule, processes: Processes, device: torch.device) -> torch.nn.Module:
    """The module with its gradients averaged over the processes: wrapped by DDP, or sharded by FSDP2 in place.

    FSDP2 shards each block that the model's library says is not to be split, and what is left as one more.
    """
    if not processes.sharded:
        ids = [torch.cuda.current_device()] if device.type == "cuda" else None
        # Some weights have no gradient in some steps: experts of a mixture, blocks of a U-Net.
        return torch.nn.parallel.DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.world,))
    blocks = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in reversed(list(module.modules())):  # the inner ones first
        if type(part).__name__ in blocks:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor; a tensor that is not sharded as it is."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; all processes have to ask for it."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def shard_like(part: torch.Tensor, weight: Any) -> torch.Tensor:
    """A shard as what `part_of` made it from: spread as the weight is."""
    if not hasattr(weight, "to_local") or not part.dim():
        return part.to(weight.device) if part.dim() else part
    from torch.distributed.tensor import DTensor

    shape = {"shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(
        part.to(weight.to_local().device), weight.device_mesh, weight.placements, run_check=False, **shape
    )


def share_of(value: torch.Tensor, weight: Any) -> torch.Tensor:
    """A whole tensor, the same in all processes, spread as the weight is; numbers stay on the CPU."""
    if not value.dim():
        return value.clone()
    if not hasattr(weight, "to_local"):
        return value.clone().to(weight.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
