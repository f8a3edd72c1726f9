"""Training on several processes: our own, or those of a user's launcher (torchrun, accelerate launch, srun).

Under a launcher, the first process runs the loop; the others wait, and join it for each training.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftune.config.base import ConfigSection
from raftune.config.load import differences, validate
from raftune.config.run import RunConfig
from raftune.engines.training import Result, train_in_processes
from raftune.errors import ConfigError, EngineError, NotFinite, RaftuneError, StoreError
from raftune.policies.registry import family_of, load_policy
from raftune.protocols import SupportsProcesses

if TYPE_CHECKING:
    from raftune.training.processes import Processes

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
WAITING = timedelta(days=30)  # for the next training, while the first process generates and scores


def connect(rank: int, world: int, local_rank: int, store: Any = None) -> None:
    """Joins the processes and takes this one's device. Without a store, the launcher's variables say where they meet.

    Tensors on the CPU go through gloo, those on GPUs through NCCL.
    """
    import torch
    from torch import distributed

    from raftune.training.processes import TIMEOUT_MINUTES

    backend = "gloo"
    if torch.cuda.device_count() > local_rank:  # with fewer GPUs than processes, these train on the CPU
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    meeting = {"store": store} if store is not None else {"init_method": "env://"}
    timeout = timedelta(minutes=TIMEOUT_MINUTES)
    distributed.init_process_group(backend, rank=rank, world_size=world, timeout=timeout, **meeting)


def task_of(config: RunConfig, folder: Path, start: Path, rows: Path, work: Path, out: Path) -> dict[str, Any]:
    """A training, as plain data: the policy of a committed folder, on these rows."""
    paths = {"folder": folder, "start": start, "rows": rows, "work": work, "out": out}
    resolved = {name: str(path.resolve()) for name, path in paths.items()}
    return {"config": config.model_dump(mode="json"), "parallel": config.training.parallel, **resolved}


def train_part(task: Mapping[str, Any], processes: Processes) -> Result:
    """This process's part of a training. Raises NotFirst where it ends in another process than the first."""
    from raftune.training.processes import training_together

    config = validate(dict(task["config"]))
    device = getattr(config.policy, "device", "cpu")
    if device.startswith("cuda"):  # without a number it is the one that this process took
        config = config.model_copy(update={"policy": config.policy.model_copy(update={"device": "cuda"})})
    folder, start, rows, work, out = (Path(task[name]) for name in ("folder", "start", "rows", "work", "out"))
    if not rows.is_file():
        raise StoreError(
            f"every process must see the run's directory; process {processes.rank} finds no {rows}. Put the run on a "
            "disk that all machines share."
        )
    import torch

    before = torch.get_num_threads()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes.world))
    torch.set_num_threads(task.get("threads") or max(1, config.engine.threads // here))
    try:
        with training_together(processes):
            policy = load_policy(family_of(config), config, folder, start)
            report = policy.train(rows, work, out)
            return report, policy.notes()
    finally:
        torch.set_num_threads(before)


# -- how many ----------------------------------------------------------------------------------------------------------


def gpus(config: RunConfig) -> int | None:
    """The visible GPUs; None where the policy is not on one."""
    from raftune.training.devices import choose_device

    if choose_device(getattr(config.policy, "device", "cpu")).type != "cuda":
        return None
    import torch

    return torch.cuda.device_count()


def process_count(config: RunConfig) -> int:
    """How many processes train: those of the launcher, else as configured; auto is one for each GPU."""
    if _launched is not None:
        return _launched.world
    count = config.training.processes
    return (gpus(config) or 1) if count == "auto" else int(count)


def launched_processes() -> Processes:
    """The processes that this one belongs to already: those of a launcher, or itself alone."""
    from raftune.training.processes import Processes

    return Processes() if _launched is None else Processes(_launched.rank, _launched.world)


def trainer_for(
    config: RunConfig, start: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> Callable[[Path, Path, Path, Path], Result] | None:
    """A function (folder, rows, work, out) that trains on several processes; None where one process trains."""
    count = process_count(config)
    if count == 1:
        return None

    def train(folder: Path, rows: Path, work: Path, out: Path) -> Result:
        work.mkdir(parents=True, exist_ok=True)
        task = task_of(config, folder, start, rows, work, out)
        if _launched is not None:
            return _launched.train(task)
        return train_in_processes(task, count, max(1, config.engine.threads // count), work / "processes.log", progress)

    return train


def check_processes(config: RunConfig, family: Any) -> Iterator[str]:
    """What cannot work of `training.processes` and `training.parallel`, a line each."""
    training, name = config.training, config.policy.family
    many = training.processes not in (1, "auto") or _launched is not None
    ways = family.parallel if isinstance(family, SupportsProcesses) else frozenset()
    if not ways:
        if many:
            given = f"a launcher's {_launched.world}" if _launched is not None else str(training.processes)
            yield (
                f"training.processes must be 1 for policy.family: {name}, which trains in one process; got {given}. "
                "Leave it out, and start raftune without a launcher."
            )
        return
    if _launched is not None and training.processes not in (1, "auto", _launched.world):
        yield (
            f"training.processes must be that of the launcher, {_launched.world}; got {training.processes}. Leave it "
            "out: a launcher decides."
        )
        return
    there = gpus(config)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _launched is not None else process_count(config)
    if there is not None and here > there:
        yield f"training.processes must not exceed the GPUs, {there}; got {here} here. Lower it; auto is all."
    count = process_count(config)
    if there is None and count > 1 and getattr(config.policy, "device", "cpu") in ("auto", "mps"):
        import torch

        if torch.backends.mps.is_available():
            yield f"training.processes must be 1 on mps; got {count}. Set policy.device: cpu, or leave it out."
    if training.parallel == "fsdp":
        if not many and training.processes == 1:
            yield "training.parallel: fsdp spreads a model over processes; got training.processes = 1. Raise it."
        if "fsdp" not in ways or getattr(config.policy, "load_in_4bit", False):
            what = "policy.load_in_4bit" if "fsdp" in ways else f"policy.family: {name}"
            yield f"training.parallel must be ddp with {what}, which cannot be cut into shards; got fsdp. Write ddp."
        if training.trainer_kwargs.get("fp16"):
            yield "training.parallel must be ddp with trainer_kwargs.fp16; got fsdp. Write ddp, or bf16."
    from raftune.training.processes import shares

    try:
        shares(training.per_device_train_batch_size, training.gradient_accumulation_steps, count)
    except ConfigError as error:
        yield str(error)


# -- a user's launcher -------------------------------------------------------------------------------------------------


class Launched:
    """This process among those of a launcher, connected by gloo; they wait for the first one as long as it takes."""

    def __init__(self) -> None:
        from torch import distributed

        self.rank, self.world, local_rank = (int(os.environ[name]) for name in VARIABLES)
        # What `accelerate launch` sets would configure transformers' Trainer; the configuration alone decides.
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[name]
        try:
            connect(self.rank, self.world, local_rank)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK say that a launcher began {self.world} processes; they did not meet "
                f"({first_words(error)}). Start all of them with MASTER_ADDR and MASTER_PORT set, or unset these three."
            ) from error
        self.group: Any = distributed.new_group(backend="gloo", timeout=WAITING)

    def broadcast(self, order: Any = None) -> Any:
        """What the first process says, in every process."""
        from torch import distributed

        orders = [order]
        distributed.broadcast_object_list(orders, src=0, group=self.group)
        return orders[0]

    def check_same(self, config: ConfigSection) -> None:
        """Raises ConfigError, in every process, where they have different configurations."""
        from torch import distributed

        configs: list[Any] = [None] * self.world
        plain = config.model_dump(mode="json")
        plain.get("engine", plain).pop("threads")  # by default that of the machine
        distributed.all_gather_object(configs, plain, group=self.group)
        for rank, other in enumerate(configs):
            for name, (first, here) in sorted(differences(configs[0], other).items()):
                raise ConfigError(
                    f"all processes of a launcher must have one configuration; {name} is {first!r} for process 0 and "
                    f"{here!r} for process {rank}. Give the same command everywhere."
                )

    def train(self, task: Mapping[str, Any]) -> Result:
        """Called in the first process: all processes train."""
        from raftune.training.processes import Processes, SmallerBatches

        self.broadcast({"train": dict(task)})
        try:
            return train_part(task, Processes(self.rank, self.world, task["parallel"]))
        except (KeyboardInterrupt, RaftuneError) as error:
            if isinstance(error, SmallerBatches):
                raise EngineError(str(error)) from error
            raise
        except RuntimeError as error:
            raise EngineError(
                f"training needs all of its {self.world} processes; one of them failed ({first_words(error)}). See its "
                "output, then run the same command again: training continues from its last checkpoint."
            ) from error

    def serve(self) -> int:
        """Called in the others: trains with the first process whenever it does. Returns its exit code."""
        from raftune.store import interruption
        from raftune.training.processes import NotFirst, Processes

        while "exit" not in (order := self.broadcast()):
            # What the first process meets as well, such as a loss that is not finite, it reports itself.
            with contextlib.suppress(NotFirst, KeyboardInterrupt):
                try:
                    train_part(order["train"], Processes(self.rank, self.world, order["train"]["parallel"]))
                except RaftuneError as error:
                    if not self.agreed(error):
                        raise
            interruption.forget()
        return int(order["exit"])

    @staticmethod
    def agreed(error: RaftuneError) -> bool:
        """Whether every process has met the error, so that the group is whole."""
        return isinstance(error, NotFinite)


def first_words(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


_launched: Launched | None = None


@contextlib.contextmanager
def launched(config: ConfigSection) -> Iterator[None]:
    """Inside the block, trainings of this process are those of all processes of a launcher, if there is one.

    Only the first process enters the block; the others serve it, and raise SystemExit with its exit code. Raises
    ConfigError where their configurations differ.
    """
    global _launched
    if not all(os.environ.get(name, "").isdigit() for name in VARIABLES) or int(os.environ["WORLD_SIZE"]) < 2:
        yield
        return
    first = int(os.environ["RANK"]) == 0
    if not first:  # a launcher sends its signals to all; the first process decides
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    group = Launched()
    try:
        group.check_same(config)
    except ConfigError as error:
        if first:
            raise
        raise SystemExit(error.exit_code) from None
    if not first:
        raise SystemExit(group.serve())
    code, _launched = 0, group
    try:
        yield
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        raise
    finally:
        _launched = None
        with contextlib.suppress(RuntimeError):  # the others may have ended
            group.broadcast({"exit": code})
