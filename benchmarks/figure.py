"""The figure of the README: one run's held-out rewards by round, as an SVG that reads on light and dark pages.

raftune demo && python benchmarks/figure.py runs/demo docs/demo.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 340, 52, 220, 28, 44

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f } .axis { stroke: #8c959f; stroke-width: 1 }
  .grid { stroke: #d0d7de; stroke-width: 1 } .small { font-size: 11px; fill: #57606a }
  .a { stroke: #0969da } .b { stroke: #0969da; stroke-dasharray: 5 4 } .c { stroke: #bc4c00 }
  .line { fill: none; stroke-width: 2.2 } .fa { fill: #0969da; opacity: .16 } .fc { fill: #bc4c00; opacity: .16 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #30363d }
    .a, .b { stroke: #58a6ff } .c { stroke: #f0883e } .fa { fill: #58a6ff } .fc { fill: #f0883e } }
"""


def series(root: Path, name: str, k: str | None = None) -> list[dict[str, float]]:
    """The intervals of one metric, round by round."""
    found = []
    for path in sorted(root.glob("round-*/evaluate/metrics.json")):
        metrics: dict[str, Any] = json.loads(path.read_text())
        found.append(metrics[name][k] if k else metrics[name])
    return found


def scaled(values: list[dict[str, float]], low: float, high: float) -> list[dict[str, float]]:
    """The intervals with the range low … high laid on 0 … 1."""
    return [{part: (v[part] - low) / (high - low) for part in ("mean", "low", "high")} for v in values]


def draw(root: Path) -> str:
    """Every line is laid on its own range, from its start to its best, so that two scales can share one page."""
    curves = [
        ("a", "reward it is tuned on", series(root, "reward"), True),
        ("b", "best of 4 by that reward", series(root, "best_of_k", "4"), False),
        ("c", "held-out judge", series(root, "held_out"), True),
    ]
    reward = [v for _, _, values, _ in curves[:2] for v in values]
    ranges = {c: (min(v["low"] for v in reward), max(v["high"] for v in reward)) for c in "ab"}
    ranges["c"] = (0.0, 4.0)  # all that the judge can give
    count = len(curves[0][2])
    x = [LEFT + i * (WIDTH - LEFT - RIGHT) / max(1, count - 1) for i in range(count)]
    parts = [frame(x, ranges)]
    labels: list[tuple[float, str, str, str]] = []
    for css, label, values, band in curves:
        points = scaled(values, *ranges[css])
        y = {part: [HEIGHT - BOTTOM - p[part] * (HEIGHT - TOP - BOTTOM) for p in points] for part in points[0]}
        if band:
            outline = list(zip(x, y["high"], strict=True)) + list(zip(x, y["low"], strict=True))[::-1]
            parts.append(f'<polygon class="f{css}" points="{path(outline)}"/>')
        parts.append(f'<polyline class="line {css}" points="{path(list(zip(x, y["mean"], strict=True)))}"/>')
        labels.append((y["mean"][-1], css, label, f"{values[0]['mean']:.2f} → {values[-1]['mean']:.2f}"))
    parts += legend(labels, x[-1] + 12)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    title = "<title>Held-out rewards of the bundled starter by round, with 95 % intervals</title>"
    return f"{head}>{title}<style>{STYLE}</style>" + "".join(parts) + "</svg>\n"


def legend(labels: list[tuple[float, str, str, str]], x: float) -> list[str]:
    """Each line's sample, name, first and last value, in the order in which the lines end, near to their ends."""
    parts, free = [], float(TOP)
    for end, css, label, change in sorted(labels):
        at = free = max(end, free)
        free += 40
        parts.append(f'<line class="line {css}" x1="{x:.0f}" x2="{x + 18:.0f}" y1="{at - 4:.0f}" y2="{at - 4:.0f}"/>')
        parts.append(f'<text x="{x + 24:.0f}" y="{at:.0f}">{label}</text>')
        parts.append(f'<text class="small" x="{x + 24:.0f}" y="{at + 15:.0f}">{change}</text>')
    return parts


def frame(x: list[float], ranges: dict[str, tuple[float, float]]) -> str:
    """Axes: rounds below, the reward's range on the left."""
    low, high = ranges["a"]
    lines = []
    for i in range(5):
        y = HEIGHT - BOTTOM - i / 4 * (HEIGHT - TOP - BOTTOM)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{x[-1]:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        value = low + i / 4 * (high - low)
        lines.append(f'<text class="small" x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{value:.1f}</text>')
    for number, at in enumerate(x):
        lines.append(
            f'<text class="small" x="{at:.0f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number}</text>'
        )
    middle = (x[0] + x[-1]) / 2
    lines.append(f'<text class="small" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">round</text>')
    scales = "reward: scale on the left; the judge, 0 to 4 points, on the same height"
    lines.append(f'<text class="small" x="{LEFT}" y="{TOP - 12}">{scales}</text>')
    return "".join(lines)


def path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.write_text(draw(args.run))


if __name__ == "__main__":
    main()
