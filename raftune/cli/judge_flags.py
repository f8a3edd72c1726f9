"""Flags of a comparison: rewards, a judge, and its progress bar."""

from __future__ import annotations

import contextlib
import json as js
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from raftune.errors import ConfigError

if TYPE_CHECKING:
    from raftune.analysis.compare import JudgeSpec
    from raftune.config.rewards import RewardSpec

USUAL_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class JudgeFlags:
    """Flags of the judge model."""

    judge: Annotated[str | None, Parameter(help="URL of an OpenAI-compatible endpoint that judges the pairs.")] = None
    judge_model: Annotated[str | None, Parameter(help="The judge's name at that endpoint.")] = None
    judge_prompt: Annotated[str | None, Parameter(help="File with {prompt}, {answer_a} and {answer_b} in it.")] = None
    judge_parameters: Annotated[
        str | None, Parameter(help='JSON for every request [{"temperature": 0, "max_tokens": 512}].')
    ] = None
    judge_timeout: Annotated[float, Parameter(help="Seconds that one question may take.")] = 60.0
    judge_concurrency: Annotated[int, Parameter(help="Questions under way at once.")] = 8
    judge_retries: Annotated[int, Parameter(help="Further tries at a busy or broken endpoint (429, 5xx).")] = 3
    judge_key_env: Annotated[str, Parameter(help="Environment variable that holds the endpoint's key.")] = USUAL_KEY
    judge_cache: Annotated[str | None, Parameter(help="Folder of the judge's replies [~/.cache/raftune/judge].")] = None


NOBODY = JudgeFlags()


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


def read_judge(given: JudgeFlags) -> JudgeSpec | None:
    """The judge; None where none was asked for. Raises ConfigError."""
    if given.judge is None:
        if given.judge_model is not None or given.judge_prompt is not None:
            raise ConfigError("--judge-model and --judge-prompt need --judge. Add --judge http://127.0.0.1:8000/v1.")
        return None
    refuse_bad_numbers(given)
    if not given.judge_model:
        raise ConfigError(f"--judge needs --judge-model, the model's name at {given.judge}. Add --judge-model NAME.")
    from raftune.analysis.compare import JudgeSpec
    from raftune.clients.chat import ChatEndpoint, chat_url
    from raftune.evaluation.judge import PARAMETERS, TEMPLATE

    parameters = read_object("--judge-parameters", given.judge_parameters) if given.judge_parameters else {}
    endpoint = ChatEndpoint(
        url=chat_url(given.judge),
        model=given.judge_model,
        parameters=PARAMETERS | parameters,
        timeout=given.judge_timeout,
        concurrency=given.judge_concurrency,
        retries=given.judge_retries,
        cache=cache_folder(given.judge_cache),
        key=read_key(given.judge_key_env),
    )
    return JudgeSpec(endpoint, TEMPLATE if given.judge_prompt is None else read_template(given.judge_prompt))


def refuse_bad_numbers(given: JudgeFlags) -> None:
    """Raises ConfigError for a time, a number of questions or of tries that cannot be meant."""
    seconds = given.judge_timeout
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"--judge-timeout must be a number of seconds above 0; got {seconds}. Leave it out for 60.")
    if given.judge_concurrency < 1:
        got = given.judge_concurrency
        raise ConfigError(f"--judge-concurrency must be at least 1; got {got}. Leave it out for 8.")
    if given.judge_retries < 0:
        raise ConfigError(f"--judge-retries must be at least 0; got {given.judge_retries}. Leave it out for 3.")


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
