"""Entry point of one of several processes that train together: `-m raftune.runtime.rank TASK.json`, under
torch.distributed.run.

It ends when its standard input closes: with the process that started it, even one that was killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

POLL = 0.2  # seconds between two looks at the progress and at a request to stop


def main() -> None:
    """Trains, and reports over standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    # A copy: descriptor 0 becomes an empty file, so that no library reads what is not meant for it.
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=end_with_parent, args=(channel,), daemon=True).start()
    lock = threading.Lock()

    def send(**message: Any) -> None:
        with lock:
            channel.sendall(json.dumps(message).encode() + b"\n")

    task = json.loads(Path(sys.argv[1]).read_text())
    sys.exit(work(task, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), send))


def end_with_parent(channel: socket.socket) -> None:
    """Ends this process when the one that started it has closed the channel, or was killed."""
    while True:
        try:
            if channel.recv(1):
                continue
        except InterruptedError:
            continue
        except OSError:
            pass
        os._exit(1)


def work(task: dict[str, Any], rank: int, world: int, send: Callable[..., None]) -> int:
    """This process's part of the training. Returns the exit code."""
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from raftune.engines.training import STOP
    from raftune.errors import OutOfMemory, RaftuneError
    from raftune.runtime.distributed import connect, train_part
    from raftune.store import interruption, pulse
    from raftune.training.processes import NotFirst, Processes, SmallerBatches

    folder = Path(task["folder_of_attempt"])

    def look() -> None:
        """Tells how far the first process is, and tells it to stop."""
        last: tuple[Any, Any] = (None, None)
        while not done.wait(POLL):
            if (folder / STOP).exists() and not interruption.asked():
                interruption.ask_to_stop()
            now = (pulse.now(), interruption.promise())
            if now != last:
                send(promise=now[1], **({"progress": now[0]} if now[0] is not None else {}))
                last = now

    done = threading.Event()
    try:
        connect(rank, world, int(os.environ["LOCAL_RANK"]), FileStore(str(folder / "store"), world))
        if rank == 0:
            threading.Thread(target=look, daemon=True).start()
        report, notes = train_part(task, Processes(rank, world, task["parallel"]))
        done.set()
        if (now := pulse.now()) is not None:
            send(progress=now)
        send(report=asdict(report), notes=notes)
        return 0
    except NotFirst:
        threading.Event().wait()  # until the first process has written the result, and the channel closes
        return 0
    except SmallerBatches as error:
        send(again=str(error))
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            send(stopped=True)
        return 0
    except Exception as error:
        traceback.print_exc()
        size = {"batch_size": error.batch_size} if isinstance(error, OutOfMemory) else {}
        own = isinstance(error, RaftuneError)  # others may follow from the end of another process
        send(kind=type(error).__name__, error=str(error), rank=rank, own=own, **size)
        return 1
    finally:
        done.set()


if __name__ == "__main__":
    main()
