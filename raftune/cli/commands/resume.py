"""`raftune resume`: continues a run with its own configuration."""

from __future__ import annotations

from raftune.cli.flags import FromStage, Json, OnlyStatuses, RunDirectory, Tokens, read_run_flags


def resume(
    run: RunDirectory, *flags: Tokens, from_: FromStage = None, only: OnlyStatuses = None, as_json: Json = False
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
    from raftune.cli.commands.evaluate import run_evaluation
    from raftune.cli.run_command import work
    from raftune.config.load import merge, nested, validate
    from raftune.runtime.evaluation_target import EvalTarget
    from raftune.runtime.verification import refuse_edited
    from raftune.store.kinds import is_evaluation
    from raftune.store.run import RunFolder

    fix = "To change the configuration use flags, or `raftune train` with its files."
    changes = read_run_flags(flags, "resume", ("--from", "--only", "--json"), fix)
    folder = RunFolder(run)
    recorded = folder.configuration().model_dump(mode="json")
    refuse_edited(folder)
    config = validate(merge([recorded, nested(changes), {"output_dir": run}]))
    if is_evaluation({"num_rounds": config.num_rounds}):
        model = getattr(config.policy, "model", None) or config.name
        run_evaluation(EvalTarget(model, config.name, {}, {}), config, from_, only, as_json)
    else:
        work(config, redo=from_, only=only, as_json=as_json)
