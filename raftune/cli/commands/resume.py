"""`raftune resume`: continues a run with its own configuration."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from raftune.cli.flags import FromStage, OnlyStatuses, Tokens


def resume(
    run: Annotated[str, Parameter(help="The run's directory.")],
    *flags: Tokens,
    from_: FromStage = None,
    only: OnlyStatuses = None,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the outcome as JSON.")] = False,
) -> None:
    """Resume a run exactly: on a CPU the result is bit-identical to that of an uninterrupted run.

    raftune resume runs/mine
    raftune resume runs/mine --num-rounds 12
    raftune resume runs/mine --from 3/select --selection.rule top_m --selection.m 2
    raftune resume runs/mine --from score --only error,timeout

    Any field of the configuration is a flag. A change that affects committed stages is refused with the difference,
    unless --from redoes that stage and all later ones; the earlier results move to superseded/.

    --only scores again what failed: all samples with a part of such a status (error, timeout, invalid, not_applicable,
    ok) get new scores from every reward, from the first round on that has one. All other samples keep their scores.
    """
    from raftune.cli.commands.evaluate import carry_out
    from raftune.cli.flags import read_tokens
    from raftune.cli.run_command import work
    from raftune.config.load import merge, nested, validate
    from raftune.errors import ConfigError
    from raftune.runtime.evaluation_target import EvalTarget
    from raftune.runtime.verification import refuse_edited
    from raftune.store.kinds import is_evaluation
    from raftune.store.run import RunFolder

    given = read_tokens(flags, "resume", ("--from", "--only", "--json"))
    if given.words:
        raise ConfigError(
            f"resume takes one run; got {given.words[0]!r} as well. To change the configuration use flags, or "
            "`raftune train` with its files."
        )
    folder = RunFolder(run)
    recorded = folder.configuration().model_dump(mode="json")
    refuse_edited(folder)
    config = validate(merge([recorded, nested(given.flags), {"output_dir": run}]))
    if is_evaluation({"num_rounds": config.num_rounds}):
        model = getattr(config.policy, "model", None) or config.name
        carry_out(EvalTarget(model, config.name, {}, {}), config, from_, json, only)
    else:
        work(config, redo=from_, only=only, as_json=json)
