"""`raftune compare`: compares two rounds or runs, pair by pair, with optional gates."""

from __future__ import annotations

import json as js
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from raftune.cli.judge_flags import NOBODY, JudgeFlags, asking, read_judge, read_rewards
from raftune.cli.output import PlainTable, echo
from raftune.errors import ConfigError, GateFailed
from raftune.results.samples import answer_text
from raftune.sanitize import counted, harmless, one_line, percent

if TYPE_CHECKING:
    from raftune.analysis.compare import Comparison, ComparisonMeasure
    from raftune.evaluation.paired import PairedEstimate, PairedTest

NAMED = 3  # prompts that are named on either side


def compare(
    a: Annotated[str, Parameter(help="A run (its best round), or RUN@ROUND: a number, best, last, start.")],
    b: Annotated[str | None, Parameter(help="The other side, in the same form; none: A's run before training.")] = None,
    *,
    reward: Annotated[
        tuple[str, ...],
        Parameter(negative="", show_default=False, help="Also score both with this reward. Repeatable."),
    ] = (),
    tie_within: Annotated[float, Parameter(help="Scores that differ by no more than this are a tie.")] = 0.0,
    by: Annotated[
        str | None, Parameter(help="Measure that ranks the prompts; default: held_out, otherwise reward.")
    ] = None,
    show: Annotated[int, Parameter(help="Show both completions of the N clearest wins and losses.")] = 0,
    out: Annotated[str | None, Parameter(help="Write every pair to this file: FILE.parquet.")] = None,
    fail_if: Annotated[
        tuple[str, ...],
        Parameter(
            negative="", show_default=False, help="Exit with 3 if this holds, such as 'reward.p > 0.05'. Repeatable."
        ),
    ] = (),
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print everything as JSON.")] = False,
    judging: Annotated[JudgeFlags, Parameter(name="*")] = NOBODY,
) -> None:
    """Compare two rounds or runs on the same prompts and seeds: win rate, difference, significance.

    raftune compare runs/mine
    raftune compare runs/mine@best runs/other@best --show 2
    raftune compare runs/mine --fail-if "held_out.win_rate.low < 0.5" --fail-if "held_out.p > 0.05"
    raftune compare runs/mine --judge http://127.0.0.1:8000/v1 --judge-model NAME --out pairs.parquet

    Samples are paired by prompt and seed: rounds of a run, or two runs with the same held-out prompts and
    evaluation.seed. Intervals are 95 %, over prompts; p is from a paired sign-flip test.

    A judge compares each pair in both orders; a verdict that depends on the order is a tie. Its replies are cached on
    disk. Failures are counted and are not ties.

    A gate is MEASURE.FIELD, an operator and a number. Measures are those of the table: reward, held_out, a part's name,
    a new reward's name, judge. Fields are win_rate, difference, a, b (each with .low and .high), p, wins, ties, losses,
    pairs, prompts, left_out, and of a judge inconsistent and failures. A gate on a missing value fails.
    """
    from raftune.analysis.compare import compare as compare_sides
    from raftune.analysis.compare import document

    if show < 0:
        raise ConfigError(f"--show must be at least 0; got {show}. Leave it out to see no answers.")
    who = read_judge(judging)
    wanted: dict[str, Any] = {"fail_if": fail_if, "tie_within": tie_within, "by": by, "out": out}
    with asking() as tell:
        found = compare_sides(a, b, rewards=read_rewards(reward), judge=who, tell=tell, **wanted)
    if json:
        print(js.dumps(document(found, show or NAMED), ensure_ascii=False))
    else:
        say_all(found, show, out)
    if found.failure:
        raise GateFailed(found.failure)


# -- what was found ----------------------------------------------------------------------------------------------------


def say_all(found: Comparison, number: int, out: str | None) -> None:
    """The table, what must be known to read it, the prompts that stand out, and the gates."""
    pairs = found.pairs
    echo(f"A  {pairs.side_a.words}")
    echo(f"B  {pairs.side_b.words}")
    a_prompt = f"{len(pairs) / len(pairs.prompts):.3g}"
    answers = "answer" if a_prompt == "1" else "answers"
    asked = counted(len(pairs.prompts), "prompt")
    echo(
        f"{counted(len(pairs), 'pair')}: {asked}, {a_prompt} {answers} each, the same seeds",
        style="dim",
    )
    for line in found.differences:
        echo(f"differs: {line}", style="yellow")
    echo("")
    table(found).show()
    echo("")
    for line in notes(found):
        echo(line, style="dim")
    say_extremes(found, number)
    passed = [checked for checked in found.gates if not checked.closed]  # those that failed are the error
    if passed or out is not None:
        echo("")
    for checked in passed:
        echo(f"gate passed: {checked.gate.text}: {checked.words}.")
    if out is not None:
        echo(f"Wrote {counted(len(pairs), 'pair')} to {out}.")


def table(found: Comparison) -> PlainTable:
    """A row a measure."""
    grid = PlainTable("measure", "A", "B", "A - B", "win/tie/loss", "A's win rate", "p", right=frozenset({1, 2, 4, 6}))
    for measure in found.computed:
        assert measure.result is not None
        grid.add(one_line(measure.title, 24), *cells(measure.result))
    return grid


def cells(result: PairedTest) -> tuple[str, ...]:
    """The measure's numbers: means and difference in units of the score, shares in per cent."""
    shares = "/".join(f"{100 * share:.0f}" for share in (result.wins, result.ties, result.losses))
    rate = result.win_rate
    level = (mean(result.a), mean(result.b), difference(result.difference))
    return *level, f"{shares} %", f"{percent(rate.mean)}{ends(rate, 100, '.0f')}", f"{result.p:.4f}"


def mean(estimate: PairedEstimate | None) -> str:
    return "–" if estimate is None else f"{estimate.mean:.3f}"


def difference(estimate: PairedEstimate | None) -> str:
    return "–" if estimate is None else f"{estimate.mean:+.3f}{ends(estimate, 1, '+.3f')}"


def ends(estimate: PairedEstimate, factor: float, how: str) -> str:
    """The interval in brackets; nothing where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{factor * estimate.low:{how}}, {factor * estimate.high:{how}}]"


def notes(found: Comparison) -> list[str]:
    """How to read the table, and what is missing from it."""
    from raftune.evaluation.paired import FEWEST

    results = [measure.result for measure in found.computed if measure.result is not None]
    drawn = [result.flips for result in results if result.flips is not None]
    how = f"{drawn[0]:,} random choices of signs" if drawn else "all choices of signs"
    said = [f"[95 % intervals] over prompts; p: sign-flip test on prompts, two-sided, {how}."]
    few = min(result.prompts for result in results)
    if few < FEWEST:
        said.append(
            f"too few for an interval or for p below 0.05: {counted(few, 'prompt')}; compare on {FEWEST} or more."
        )
    for measure in found.measures:
        said += [f"not compared: {measure.title.strip()}: {measure.why}."] if measure.result is None else []
        said += words_of_judge(measure) if measure.kind == "judge" else left_out(measure)
    return said


def left_out(measure: ComparisonMeasure) -> list[str]:
    count = measure.facts.get("left_out", 0) if measure.result is not None else 0
    return [f"{measure.title.strip()}: {counted(count, 'pair')} left out, without a score in A or B."] if count else []


def words_of_judge(measure: ComparisonMeasure) -> list[str]:
    """What was asked, how much the order mattered, and what failed."""
    facts = measure.facts
    asked = f"{counted(facts['questions'], 'question')} ({facts['cached']} answered from disk)"
    same = counted(facts["identical"], "pair")
    said = [f"{measure.title}: {asked}; {same} of identical answers are ties, and were not asked."]
    if facts["inconsistent"] is not None:
        first = "" if facts["first"] is None else f"; {percent(facts['first'])} of its choices were the first answer"
        said.append(f"  position bias: {percent(facts['inconsistent'])} of verdicts changed with the order{first}.")
    if facts["failed"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in facts["failed"].items())
        said.append(f"  no verdict: {kinds}; {counted(facts['left_out'], 'pair')} left out.")
    return said


def say_extremes(found: Comparison, number: int) -> None:
    """The prompts on which A leads and trails most; with both answers where so many are wanted."""
    ahead, behind = found.extremes(number or NAMED)
    for title, prompts in (("ahead", ahead), ("behind", behind)):
        echo("")
        if not prompts:
            echo(f"A is {title} on no prompt by {found.by.title.strip()}.")
            continue
        echo(f"A is furthest {title} by {found.by.title.strip()} on:")
        for prompt, lead in prompts:
            content, rows = found.pairs.prompts[prompt], int((found.pairs.groups == prompt).sum())
            mean_of = f"  mean of {rows} pairs" if number and rows > 1 else ""
            echo(
                f"  {lead:+7.3f}  {content.id}  {one_line(text_of(content.content), 60)}{mean_of}",
                style="bold" if number else "",
            )
            if number:
                say_pair(found, found.telling(prompt, lead), rows)


def say_pair(found: Comparison, row: int, of: int) -> None:
    """Both answers of a pair whole, each with its score; which of the prompt's pairs it is, and its own lead."""
    _, k, _ = found.pairs.keys[row]
    own = float(found.by.leads[row])
    if of > 1:
        echo(f"    answer {k} of {of}, the clearest: {own:+.3f}", style="dim")
    for letter, answers, scores in zip("AB", found.pairs.answers, (found.by.a, found.by.b), strict=True):
        worth = "" if scores is None else f"{scores[row]:.3f}"
        lines = harmless(answer_text(answers[row])).splitlines() or ["(empty)"]
        echo(f"    {letter} {worth:>8}  {lines[0]}")
        for line in lines[1:]:
            echo(f"{'':>16}{line}")


def text_of(prompt: Any) -> str:
    """The prompt as one text; of messages, the last."""
    return str(prompt[-1].get("content", "")) if isinstance(prompt, list) else str(prompt)
