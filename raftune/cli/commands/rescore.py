"""`raftune rescore`: scores existing samples with other rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from raftune.cli.flags import Tokens

if TYPE_CHECKING:
    from raftune.analysis.whatif import WhatIfResult

OPTIONS = ("--round", "--name", "--show", "--json")


def rescore(
    run: Annotated[str, Parameter(help="The run's directory.")],
    *flags: Tokens,
    round_: Annotated[str, Parameter(name="--round", help="A number, or all.")] = "all",
    name: Annotated[
        str | None, Parameter(help="Name of the result, in RUN/whatif/NAME; default: the rewards' names.")
    ] = None,
    show: Annotated[int, Parameter(help="Number of prompts to show: those that would change most.")] = 3,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the outcome as JSON.")] = False,
) -> None:
    """Score a run's samples with another reward and show what would be kept; nothing is generated.

    raftune rescore runs/mine --rewards.reward_funcs rewards.py:polite
    raftune rescore runs/mine --rewards.reward_funcs '{"spec": "length", "options": {"target": 20}}' --name shorter
    raftune rescore runs/mine --rewards.reward_funcs a.py:kind --rewards.reward_funcs b.py:brief --name both

    Every field of `rewards` is a flag. The run's rule selects by the new scores, and the two training sets are
    compared. The run is not changed: scores and verdicts are written to RUN/whatif/NAME, and `raftune select RUN
    --scores NAME` can use them. A second call reads the stored result.
    """
    from raftune.analysis.whatif import rescore as again
    from raftune.cli.flags import read_tokens
    from raftune.cli.whatif_table import show_outcome
    from raftune.errors import ConfigError
    from raftune.runtime.progress import Progress

    given = read_tokens(flags, "rescore", OPTIONS)
    if given.words:
        raise ConfigError(
            f"rescore takes one run; got {given.words[0]!r} as well. Write --rewards.reward_funcs before it."
        )
    if show < 0:
        raise ConfigError(f"--show must be at least 0; got {show}. Write 0 to see no answers.")
    with Progress() as progress:
        found: WhatIfResult = again(run, given.flags, which=round_, name=name, show=show, observe=progress)
    show_outcome(found, as_json=json)
