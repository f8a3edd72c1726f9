"""The results as one page of markdown and one figure a claim."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from claims.arms import ARMS, Sizes
from claims.table import DIGITS, MEASURES, NAMES, RULE, Claim, Result, Results, Verdict, verdict

WIDTH, HEIGHT, PANEL_WIDTH, LEFT, TOP, BOTTOM = 760, 260, 320, 56, 34, 44
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600 } .small { fill: #57606a }
  .grid { stroke: #d0d7de } .seed { fill: #0969da; fill-opacity: .45 } .mean { stroke: #0969da; stroke-width: 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #30363d }
    .seed { fill: #58a6ff } .mean { stroke: #58a6ff } }
"""


def write_page(claims: Sequence[Claim], results: Results, seeds: Sequence[int], sizes: Sizes, out: Path) -> Path:
    """results.md and its figures, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    found = {
        claim.name: [verdict(contrast, contrast.values(results, seeds)) for contrast in claim.contrasts]
        for claim in claims
    }
    for claim in claims:
        (out / f"{claim.name}.svg").write_text(figure(claim, results, seeds), encoding="utf-8")
    lines = [*opening(seeds, sizes), *summary(claims, found)]
    for number, claim in enumerate(claims, 1):
        lines += section(number, claim, found[claim.name], results, seeds)
    path = out / "results.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def opening(seeds: Sequence[int], sizes: Sizes) -> list[str]:
    many = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return [
        "# The paper's claims, at a size that runs on two cores",
        "",
        f"The bundled starter (0.9M parameters), {many}, {sizes.rounds} rounds of {sizes.prompts} prompts, K = 8 "
        "unless said otherwise, learning rate 1e-3, two epochs a round. Each arm's last model is judged at temperature "
        f"1 on {sizes.held_out} held-out prompts with {sizes.draws} completions each: by the reward it was trained on "
        "(without noise), by the held-out judge (0 to 4), and by its KL to the start in nats per completion. Cells are "
        "means over seeds, with each seed's value in brackets. `python benchmarks/paper.py` makes this page.",
        "",
        RULE,
        "",
    ]


def summary(claims: Sequence[Claim], found: dict[str, list[Verdict]]) -> list[str]:
    lines = ["| claim | contrast, expected above 0 | the paper | ours, with its 95 % interval | verdict |"]
    lines.append("|---|---|---|---|---|")
    for claim in claims:
        for contrast, said in zip(claim.contrasts, found[claim.name], strict=True):
            cells = (claim.title, f"{contrast.words} ({NAMES[contrast.measure]})", contrast.paper or "no figure")
            lines.append(f"| {' | '.join(cells)} | {in_words(said)} | **{said.word}** |")
    return [*lines, ""]


def in_words(said: Verdict) -> str:
    half = "" if said.half is None else f" ± {said.half:.3f}"
    return f"{said.mean:+.3f}{half}"


def section(number: int, claim: Claim, found: list[Verdict], results: Results, seeds: Sequence[int]) -> list[str]:
    measures = (*MEASURES, *claim.extra)
    lines = [f"## {number}. {claim.title}", ""]
    lines.append("| arm | " + " | ".join(NAMES[measure] for measure in measures) + " |")
    lines.append("|---" * (len(measures) + 1) + "|")
    for arm in claim.arms:
        cells = [cell([results[arm, s].get(measure) for s in seeds], DIGITS.get(measure, 3)) for measure in measures]
        lines.append(f"| {label(claim, arm)} | {' | '.join(cells)} |")
    lines += ["", f"![{claim.title}]({claim.name}.svg)", ""]
    for contrast, said in zip(claim.contrasts, found, strict=True):
        each = ", ".join(f"{value:+.3f}" for value in said.values)
        paper = f"the paper: {contrast.paper}" if contrast.paper else "the paper has no figure"
        measured = f"{contrast.words} ({NAMES[contrast.measure]}) {in_words(said)}; by seed {each}; {paper}"
        lines.append(f"- **{said.word}**: {measured}.")
    if claim.empty_arm:
        lines += ["", empty_words(label(claim, claim.empty_arm), [results[claim.empty_arm, s] for s in seeds])]
    return [*lines, *(["", claim.note] if claim.note else []), ""]


def empty_words(name: str, found: Sequence[Result]) -> str:
    """Which prompts had no kept samples, by kind of request over all seeds, the worst first; and some of them."""
    totals: dict[str, list[int]] = {}
    for result in found:
        for domain, (empty_prompts, count) in result["empty_by_domain"].items():
            before = totals.get(domain, [0, 0])
            totals[domain] = [before[0] + empty_prompts, before[1] + count]
    order = sorted(totals, key=lambda domain: -totals[domain][0] / totals[domain][1])
    kinds = ", ".join(f"{domain} {totals[domain][0]} of {totals[domain][1]}" for domain in order)
    examples = "; ".join(f"“{text}”" for result in found for text in result["empty_prompts"][:2])
    return f"Prompts without kept samples under {name} ranking, by kind of request: {kinds}. For example: {examples}."


def cell(values: list[float | None], digits: int) -> str:
    """The mean, and each seed's value; a dash where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    each = ", ".join(f"{value:.{digits}f}" for value in known)
    return f"{statistics.fmean(known):.{digits}f} ({each})" if len(known) > 1 else each


# -- the figure --------------------------------------------------------------------------------------------------------


def figure(claim: Claim, results: Results, seeds: Sequence[int]) -> str:
    """Two panels, a column an arm: a dot a seed, a bar at their mean. It reads on light and dark pages."""
    panels = "".join(
        f'<g transform="translate({LEFT + i * (PANEL_WIDTH + LEFT)},0)">{panel(claim, measure, results, seeds)}</g>'
        for i, measure in enumerate(claim.shown)
    )
    words = html.escape(f"{claim.title}: {' and '.join(NAMES[m] for m in claim.shown)} by arm and seed")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">'
        f"<title>{words}</title><style>{STYLE}</style>{panels}</svg>\n"
    )


def panel(claim: Claim, measure: str, results: Results, seeds: Sequence[int]) -> str:
    columns = {arm: [v for s in seeds if (v := results[arm, s].get(measure)) is not None] for arm in claim.arms}
    columns = {arm: values for arm, values in columns.items() if values}
    ticks = round_ticks([v for values in columns.values() for v in values])
    low, high, step = ticks[0], ticks[-1], PANEL_WIDTH / max(1, len(columns))

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="0" y="18">{NAMES[measure]}</text>']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="0" x2="{PANEL_WIDTH}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="small" x="-6" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for i, (arm, values) in enumerate(columns.items()):
        x, mean, fall = (i + 0.5) * step, y(statistics.fmean(values)), 13 * (i % 2) * (len(columns) > 3)
        for j, value in enumerate(values):
            beside = x + 7 * (j - (len(values) - 1) / 2)
            parts.append(f'<circle class="seed" cx="{beside:.1f}" cy="{y(value):.1f}" r="4"/>')
        parts.append(f'<line class="mean" x1="{x - 14:.1f}" x2="{x + 14:.1f}" y1="{mean:.1f}" y2="{mean:.1f}"/>')
        name = html.escape(label(claim, arm))
        parts.append(f'<text class="small" x="{x:.1f}" y="{HEIGHT - 22 + fall}" text-anchor="middle">{name}</text>')
    return "".join(parts)


def round_ticks(values: list[float]) -> list[float]:
    """Round numbers from below the least value to above the greatest, four to eight of them."""
    least, spread = min(values), (max(values) - min(values)) or abs(values[0]) or 1.0
    rough = spread / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.floor(least / step)
    last = max(first + 1, math.ceil(max(values) / step))
    return [round(i * step, 10) for i in range(first, last + 1)]


def label(claim: Claim, arm: str) -> str:
    """The arm as this claim calls it."""
    return claim.labels.get(arm, ARMS[arm].label)
