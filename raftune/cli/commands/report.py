"""`raftune report`: writes a run's HTML report."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from raftune.cli.flags import RunDirectory, switch
from raftune.cli.output import echo
from raftune.errors import RunDamaged
from raftune.sanitize import shell_command


def report(
    run: RunDirectory,
    *,
    out: Annotated[str | None, Parameter(help="Where to write it; default: RUN/report.html.")] = None,
    as_json: Annotated[bool, switch("Print what the page shows as JSON; write no page.", "--json")] = False,
) -> None:
    """Write a run's report: one HTML file with charts, all candidates, reasons and alarms.

    raftune report runs/mine --out mine.html

    A run writes its report after every round. Use this command for a run with `report: false`, of an earlier version,
    or with damaged files; the page then names what is missing, and the exit code is 1.
    """
    from raftune.report import collect, write_report

    page = collect(run)
    if as_json:
        print(json.dumps(page.document, ensure_ascii=False))
    else:
        echo(str(write_report(run, out, found=page)))
    if missing := page.document["missing"]:
        more = f" (and {len(missing) - 1} more, which the page names)" if len(missing) > 1 else ""
        command = shell_command("raftune", "verify", run)
        raise RunDamaged(f"{missing[0]}{more}. The page leaves it out; `{command}` lists what is damaged.")
