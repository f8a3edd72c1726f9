"""What the flags of a comparison mean: rewards that score now, a judge, and the bar while it is asked."""

from __future__ import annotations

import contextlib
import json as js
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftune.errors import ConfigError

if TYPE_CHECKING:
    from raftune.comparison import Judge
    from raftune.config.rewards import RewardSpec

USUAL_KEY = "OPENAI_API_KEY"


def read_rewards(specs: tuple[str, ...]) -> list[RewardSpec]:
    """The rewards; one with options is written as JSON. Raises ConfigError."""
    from raftune.config.load import validate_as
    from raftune.config.rewards import RewardSpec

    given = [read_object("--reward", spec) if spec.lstrip().startswith("{") else {"spec": spec} for spec in specs]
    return [validate_as(RewardSpec, spec) for spec in given]


def read_object(flag: str, text: str) -> dict[str, Any]:
    """The JSON object. Raises ConfigError that names the flag."""
    try:
        found = js.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag} must be JSON; got {text!r}: {error}. Put it in quotes.") from error
    if not isinstance(found, dict):
        raise ConfigError(f'{flag} must be a JSON object; got {text!r}. Write {{"name": value}}.')
    return found


def read_judge(
    url: str | None,
    model: str | None,
    *,
    prompt: str | None,
    parameters: str | None,
    timeout: float,
    concurrency: int,
    retries: int,
    key_env: str,
    cache: str | None,
) -> Judge | None:
    """The judge; None where none was asked for. Raises ConfigError."""
    if url is None:
        if model is not None or prompt is not None:
            raise ConfigError("--judge-model and --judge-prompt need --judge. Add --judge http://127.0.0.1:8000/v1.")
        return None
    if not model:
        raise ConfigError(f"--judge needs --judge-model, the name of the model at {url}. Add --judge-model NAME.")
    if not (math.isfinite(timeout) and timeout > 0):
        raise ConfigError(f"--judge-timeout must be a number of seconds above 0; got {timeout}. Leave it out for 60.")
    if concurrency < 1:
        raise ConfigError(f"--judge-concurrency must be at least 1; got {concurrency}. Leave it out for 8.")
    if retries < 0:
        raise ConfigError(f"--judge-retries must be at least 0; got {retries}. Leave it out for 3.")
    from raftune.comparison import Judge
    from raftune.evaluation.endpoint import Endpoint, chat_url
    from raftune.evaluation.judge import PARAMETERS, TEMPLATE

    endpoint = Endpoint(
        url=chat_url(url),
        model=model,
        parameters=PARAMETERS | (read_object("--judge-parameters", parameters) if parameters else {}),
        timeout=timeout,
        concurrency=concurrency,
        retries=retries,
        cache=cache_folder(cache),
        key=read_key(key_env),
    )
    return Judge(endpoint, TEMPLATE if prompt is None else read_template(prompt))


def read_key(name: str) -> str | None:
    """The key in this environment variable; None where the usual one is not set. Raises ConfigError."""
    key = os.environ.get(name, "").strip()
    if not key and name != USUAL_KEY:
        raise ConfigError(f"--judge-key-env names {name!r}, which is not set. Set it, or leave the flag out.")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key in {name} holds characters that a header cannot have. Set it again.")
    return key or None


def cache_folder(given: str | None) -> Path:
    """Where replies are kept: a folder that can be written. Raises ConfigError."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(given).expanduser() if given else Path(base) / "raftune" / "judge"
    try:
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--judge-cache must be a folder that can be written; got {folder}: {error.strerror}. Name another."
        ) from error
    return folder


def read_template(path: str) -> str:
    """The judge's prompt from a file. Raises ConfigError where it cannot be read or lacks a place."""
    from raftune.evaluation.judge import check_template

    try:
        return check_template(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--judge-prompt must name a text file; got {path!r}: {why}. Check the path.") from error


@contextlib.contextmanager
def asking() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while a judge is asked; where nobody watches, one line."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("asking the judge"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", visible=False)

        def tell(done: int, of: int) -> None:
            if done == 1 and not console.is_terminal:
                console.print(f"asking the judge {of} questions")
            bars.update(task, completed=done, total=of, visible=True)

        yield tell
