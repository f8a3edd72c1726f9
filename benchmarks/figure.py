"""The figure of the README: one run's held-out rewards by round, as an SVG that reads on light and dark pages.

raftune demo && python benchmarks/figure.py runs/demo docs/demo.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from raftune.report.charts import BEST_OF, HELD_OUT, REWARD, START, described, line, line_chart
from raftune.report.collect import best_of, by_round
from raftune.report.reading import RunReader
from raftune.store.run import RunFolder

TITLE = "Held-out rewards of the bundled starter by round, with 95 % intervals"
SIZE = (760, 340)


def generate(root: Path) -> str:
    """The reward that it is trained on, the best of k by that reward, and the held-out judge."""
    reader = RunReader(RunFolder(root))
    k, best = best_of(reader, "best_of_k")
    lines = [
        line("reward it is trained on", by_round(reader, "reward"), REWARD),
        line(f"best of {k} by it", best, BEST_OF, "dashed", "hollow"),
        line("held-out judge", by_round(reader, "held_out"), HELD_OUT, shape="square"),
    ]
    return (
        line_chart(lines, title=TITLE, description=described(lines), x_names=START, size=SIZE, standalone=True) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.write_text(generate(args.run), encoding="utf-8")


if __name__ == "__main__":
    main()
