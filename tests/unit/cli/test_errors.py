"""Every outcome has its exit code, and every error its line."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from cyclopts import App

from raftune.cli import main
from raftune.cli.errors import interruptible, run_command
from raftune.config.load import fields_of
from raftune.config.run import RunConfig
from raftune.errors import ConfigError, GateFailed, Interrupted, RaftuneError, StoreError


def app_that(raises: BaseException | None = None, returns: int | None = None) -> App:
    app = App(name="raftune", suppress_keyboard_interrupt=False)

    @app.command
    def work() -> int | None:
        if raises is not None:
            raise raises
        return returns

    return app


@pytest.mark.parametrize(
    ("raises", "code"),
    [
        (RaftuneError("x"), 1),
        (StoreError("x"), 1),
        (ConfigError("x"), 2),
        (GateFailed("x"), 3),
        (Interrupted("x"), 130),
        (KeyboardInterrupt(), 130),
        (KeyError("x"), 1),
        (PermissionError(13, "Permission denied", "a/b"), 1),
    ],
)
def test_an_error_ends_in_its_exit_code_and_without_a_traceback(
    raises: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(app_that(raises), ["work"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_what_a_command_returns_is_the_exit_code() -> None:
    assert run_command(app_that(returns=3), ["work"]) == 3
    assert run_command(app_that(), ["work"]) == 0


def test_each_finding_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(app_that(ConfigError("one\ntwo")), ["work"])
    assert capsys.readouterr().err == "error: one\nerror: two\n"


def test_a_message_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(app_that(ConfigError("got '\x1b[2J[red]'")), ["work"])
    assert capsys.readouterr().err == "error: got '\\x1b[2J[red]'\n"


def test_an_unforeseen_error_says_where_to_look(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(app_that(KeyError("x")), ["work"])
    assert capsys.readouterr().err == (
        "error: unexpected KeyError: 'x' (a bug, here or in code that was called; --debug shows where).\n"
    )


def test_the_systems_refusal_is_given_in_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(app_that(PermissionError(13, "Permission denied", "a/b")), ["work"])
    assert capsys.readouterr().err == "error: a/b: Permission denied.\n"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError):
        run_command(app_that(ConfigError("x")), ["work", "--debug"])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["rnus"], "'rnus' is not a command of raftune; did you mean 'runs'?"),
        (["status", "runs/x"], "'status' is not a command of raftune; did you mean 'runs'?"),
        (["reward", "chek"], "'chek' is not a command of raftune reward; did you mean 'check'?"),
        (["runs", "--jsn"], "unknown option: --jsn. Did you mean --json? `raftune runs --help` explains it."),
        (["runs", "a", "b"], "raftune runs takes no further argument; got 'b'. `raftune runs --help` explains it."),
        (["samples"], "raftune samples needs RUN; got none. `raftune samples --help` explains it."),
        (["export", "x"], "raftune export needs --format; got none. `raftune export --help` explains it."),
        (["train"], "train needs a configuration file; got none. `raftune init run.yaml` writes one."),
        (["train", "no.yaml"], "there is no configuration file no.yaml. `raftune init` writes one."),
    ],
)
def test_a_wrong_call_is_reported_in_one_line(
    tokens: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(tokens) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_without_arguments_there_is_a_guide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  raftune")] == [
        "demo",
        "init",
        "plan",
        "train",
    ]


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "pyarrow", "numpy", "pydantic", "trl", "peft", "datasets")
    code = (
        "import sys\nfrom raftune.cli import main\nmain(['--help'])\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "resume" in done.stdout


@pytest.mark.parametrize("command", ["train", "plan", "resume"])
def test_help_of_a_command_with_fields_imports_the_configuration_and_nothing_of_the_work(command: str) -> None:
    heavy = (
        "torch",
        "transformers",
        "pyarrow",
        "numpy",
        "raftune.runtime.assembly",
        "raftune.results.summary",
        "raftune.planning",
    )
    code = (
        f"import sys\nfrom raftune.cli import main\nmain([{command!r}, '--help'])\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "--output_dir" in done.stdout


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        "demo",
        "init",
        "plan",
        "train",
        "resume",
        "runs",
        "alarms",
        "samples",
        "export",
        "verify",
        "schema",
    ):
        assert main([command, "--help"]) == 0
        assert f"raftune {command}" in capsys.readouterr().out
    assert main(["reward", "check", "--help"]) == 0
    assert "raftune reward check" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "plan", "resume"])
@pytest.mark.parametrize("columns", ["70", "200"])
def test_help_lists_every_field_as_a_flag_within_the_terminal(
    command: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    main([command, "--help"])
    out = capsys.readouterr().out
    fields = {*dict(fields_of(RunConfig))}
    assert {"seed", "policy.model", "rewards.reward_funcs", "training.reference.path"} <= fields
    for field in fields:
        assert out.count(f"  --{field} ") + out.count(f"  --{field}\n") == 1, field
    listed = out.split("each a flag:\n")[1].split("\nResults go")[0]
    assert max(map(len, listed.splitlines())) <= int(columns)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly_and_says_how_to_resume(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="Resume with: raftune resume runs/x"), interruptible(Path("runs/x")):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_signal_that_foreign_code_swallowed_takes_effect_at_the_next_event() -> None:
    with pytest.raises(Interrupted), interruptible(Path("x")) as observe:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        observe("stage_end", {})


def test_an_error_that_a_signal_caused_counts_as_the_interruption() -> None:
    with pytest.raises(Interrupted), interruptible(Path("x")):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RaftuneError("importing failed") from error


def test_a_table_whose_reader_has_left_is_no_failure() -> None:
    lines = "\n".join(["from raftune.cli.output import echo", "[echo('x' * 99) for _ in range(9_999)]", "return 0"])
    program = f"""
import sys
from cyclopts import App
from raftune.cli.errors import run_command
app = App(name="raftune")
@app.command
def words():
{textwrap.indent(lines, "    ")}
sys.exit(run_command(app, ["words"]))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 0)


@pytest.mark.parametrize(
    ("tokens", "meant"),
    [(["trian"], "'train'"), (["trian", "--help"], "'train'"), (["reward", "chekc", "--help"], "'check'")],
)
def test_an_unknown_command_is_a_usage_error_whatever_follows_it(
    tokens: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from raftune.cli import main

    assert main(tokens) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and f"did you mean {meant}?" in printed.err


SLEEPER = """
import signal, sys, time
from pathlib import Path
from cyclopts import App
from raftune.store import interruption
from raftune.cli.errors import interruptible, run_command
app = App(name="raftune", suppress_keyboard_interrupt=False)

def nap(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)

@app.command
def plain():
    print("ready", flush=True)
    nap(60)

@app.command
def steps():
    with interruptible(Path("runs/x")):
        with interruption.stretch(lambda: "all is kept"):
            print("ready", flush=True)
            for _ in range(600):
                nap(0.3)
                interruption.raise_if_asked()

@app.command
def stuck():
    with interruptible(Path("runs/x")):
        with interruption.stretch(lambda: "all is kept"):
            print("ready", flush=True)
            nap(60)

@app.command
def unsaved():
    with interruptible(Path("runs/x")) as observe:
        observe("chunk", {})
        print("ready", flush=True)
        nap(60)

import raftune.cli.errors as ending
ending.GRACE = 1.0
sys.exit(run_command(app, sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "first", "last"),
    [
        ("plain", "stopping. Once more stops at once.", "no file was left half written"),
        ("steps", "stopping after the current step: all is kept", "Resume with: raftune resume runs/x"),
        ("stuck", "stopping after the current step: all is kept", "Resume with: raftune resume runs/x"),
        ("unsaved", "s of unfinished work", "Resume with: raftune resume runs/x"),
    ],
)
def test_the_first_signal_is_handled_within_a_second_and_ends_the_work_soon_after(
    command: str, first: str, last: str, number: int
) -> None:
    words = [sys.executable, "-c", SLEEPER, command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.send_signal(number)
        assert process.stderr.readline() == "\n"
        assert first in process.stderr.readline()
        assert time.monotonic() - began < 1
        rest = process.stderr.read()
        assert process.wait(10) == 130
        assert last in rest and "Traceback" not in rest
        assert time.monotonic() - began < 6
