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
    name: Annotated[str | None, Parameter(help="Where it goes: RUN/whatif/NAME; else the rewards' names.")] = None,
    show: Annotated[int, Parameter(help="Prompts whose answers are shown: those that would change most.")] = 3,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the outcome as JSON.")] = False,
) -> None:
    """Score what a run has generated with another reward, and see what it would have learned from; nothing is
    generated.

    raftune rescore runs/mine --rewards.reward_funcs rewards.py:polite
    raftune rescore runs/mine --rewards.reward_funcs '{"spec": "length", "options": {"target": 20}}' --name shorter
    raftune rescore runs/mine --rewards.reward_funcs a.py:kind --rewards.reward_funcs b.py:brief --name both

    Every field of `rewards` is a flag. The run's own rule then selects by the new scores, and the two training sets are
    compared. The run itself stays as it is: scores and verdicts go to RUN/whatif/NAME, in the shape of the run's own,
    and `raftune select RUN --scores NAME` takes it from there. A second call finds it done.
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
