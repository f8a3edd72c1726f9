"""`raftune select`: selects again with another rule or a smaller K."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from raftune.cli.flags import Tokens

OPTIONS = ("--round", "--scores", "--dry-run", "--diff", "--show", "--name", "--json")
SHOWN = 3


def select(
    run: Annotated[str, Parameter(help="The run's directory.")],
    *flags: Tokens,
    round_: Annotated[str, Parameter(name="--round", help="A number, or all.")] = "all",
    scores: Annotated[str | None, Parameter(help="Use the scores of this `raftune rescore`: its NAME.")] = None,
    dry_run: Annotated[
        bool, Parameter(name="--dry-run", negative="", show_default=False, help="Write nothing.")
    ] = False,
    diff: Annotated[
        bool, Parameter(negative="", show_default=False, help="Show completions that would be added or removed.")
    ] = False,
    show: Annotated[
        int | None, Parameter(help="Number of prompts that --diff shows: those that would change most [3].")
    ] = None,
    name: Annotated[
        str | None, Parameter(help="Name of the result, in RUN/whatif/NAME; default: the changed settings.")
    ] = None,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the outcome as JSON.")] = False,
) -> None:
    """Select again from a run's scored samples, with another rule or a smaller K, and compare.

    raftune select runs/mine --selection.rule top_m --selection.m 2 --dry-run --diff
    raftune select runs/mine --sampling.num_generations 4 --dry-run
    raftune select runs/mine --scores judge --selection.rule top_fraction --selection.keep_fraction 0.1

    Every field of `selection` is a flag. --sampling.num_generations uses the first N samples of each prompt, which are
    what the policy would have generated at that K. The run is not changed: verdicts are written to RUN/whatif/NAME, or
    not at all with --dry-run.
    """
    from raftune.analysis.whatif import reselect
    from raftune.cli.flags import read_tokens
    from raftune.cli.whatif_table import show_outcome
    from raftune.errors import ConfigError

    given = read_tokens(flags, "select", OPTIONS)
    if given.words:
        raise ConfigError(
            f"select takes one run; got {given.words[0]!r} as well. Name another rule by --selection.rule."
        )
    if show is not None and show < 0:
        raise ConfigError(f"--show must be at least 0; got {show}. Leave out --diff to see no answers.")
    shown = show if show is not None else SHOWN if diff else 0
    found = reselect(run, given.flags, which=round_, name=name, scores=scores, dry_run=dry_run, show=shown)
    show_outcome(found, as_json=json)
