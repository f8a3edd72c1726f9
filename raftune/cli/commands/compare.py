"""`raftune compare`: compares two rounds or runs, pair by pair, with optional gates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from raftune.cli.flags import Json, read_object, switch
from raftune.cli.output import PlainTable, echo
from raftune.errors import ConfigError, GateFailed
from raftune.results.samples import answer_text
from raftune.sanitize import counted, harmless, one_line, percent

if TYPE_CHECKING:
    from raftune.analysis.compare import Comparison, JudgeSpec
    from raftune.evaluation.paired import PairedEstimate, PairedTest

NAMED = 3  # prompts that are named on either side
USUAL_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class JudgeFlags:
    """Flags of the judge model."""

    judge: Annotated[str | None, Parameter(help="URL of an OpenAI-compatible endpoint that judges the pairs.")] = None
    judge_model: Annotated[str | None, Parameter(help="The judge's name at that endpoint.")] = None
    judge_prompt: Annotated[str | None, Parameter(help="File with {prompt}, {answer_a} and {answer_b} in it.")] = None
    judge_parameters: Annotated[
        str | None, Parameter(help='JSON for every request [{"temperature": 0, "max_tokens": 512}].')
    ] = None
    judge_timeout: Annotated[
        float, Parameter(help="Seconds that one question may take.", validator=Number(gt=0, lte=1e7))
    ] = 60.0
    judge_concurrency: Annotated[int, Parameter(help="Questions under way at once.", validator=Number(gte=1))] = 8
    judge_retries: Annotated[
        int, Parameter(help="Further tries at a busy or broken endpoint (429, 5xx).", validator=Number(gte=0))
    ] = 3
    judge_key_env: Annotated[str, Parameter(help="Environment variable that holds the endpoint's key.")] = USUAL_KEY
    judge_cache: Annotated[str | None, Parameter(help="Folder of the judge's replies [~/.cache/raftune/judge].")] = None


def compare(
    a: Annotated[str, Parameter(help="A run (its best round), or RUN@ROUND: a number, best, last, start.")],
    b: Annotated[str | None, Parameter(help="The other side, in the same form; none: A's run before training.")] = None,
    *,
    reward: Annotated[tuple[str, ...], switch("Also score both with this reward. Repeatable.")] = (),
    tie_within: Annotated[float, Parameter(help="Scores that differ by no more than this are a tie.")] = 0.0,
    by: Annotated[
        str | None, Parameter(help="Measure that ranks the prompts; default: held_out, otherwise reward.")
    ] = None,
    show: Annotated[
        int, Parameter(help="Show both completions of the N clearest wins and losses.", validator=Number(gte=0))
    ] = 0,
    out: Annotated[str | None, Parameter(help="Write every pair to this file: FILE.parquet.")] = None,
    fail_if: Annotated[
        tuple[str, ...], switch("Exit with 3 if this holds, such as 'reward.p > 0.05'. Repeatable.")
    ] = (),
    as_json: Json = False,
    judging: Annotated[JudgeFlags, Parameter(name="*")] = JudgeFlags(),
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
    from raftune.config.load import validate_as
    from raftune.config.rewards import RewardSpec
    from raftune.runtime.progress import StepProgress

    judge = read_judge(judging)
    specs = [read_object("--reward", text) if text.lstrip().startswith("{") else {"spec": text} for text in reward]
    rewards = [validate_as(RewardSpec, spec) for spec in specs]
    options: dict[str, Any] = {"fail_if": fail_if, "tie_within": tie_within, "by": by, "out": out}
    with StepProgress() as steps:

        def tell(done: int, of: int) -> None:
            if done == 1:
                steps.begin(f"asking the judge {counted(of, 'question')}")
            steps.advance(done, of)

        comparison = compare_sides(a, b, rewards=rewards, judge=judge, tell=tell, **options)
    if as_json:
        print(json.dumps(document(comparison, show or NAMED), ensure_ascii=False))
    else:
        show_comparison(comparison, show, out)
    if comparison.failure:
        raise GateFailed(comparison.failure)


# -- the judge ---------------------------------------------------------------------------------------------------------


def read_judge(flags: JudgeFlags) -> JudgeSpec | None:
    """The judge; None if no flag names one. Raises ConfigError."""
    if flags.judge is None:
        if flags.judge_model is not None or flags.judge_prompt is not None:
            raise ConfigError("--judge-model and --judge-prompt need --judge. Add --judge http://127.0.0.1:8000/v1.")
        return None
    if not flags.judge_model:
        raise ConfigError(f"--judge needs --judge-model, the model's name at {flags.judge}. Add --judge-model NAME.")
    from raftune.analysis.compare import JudgeSpec
    from raftune.clients.chat import ChatEndpoint, chat_url
    from raftune.evaluation.judge import PARAMETERS, TEMPLATE, check_template

    key = os.environ.get(flags.judge_key_env, "").strip()
    if not key and flags.judge_key_env != USUAL_KEY:
        raise ConfigError(
            f"--judge-key-env names {flags.judge_key_env!r}, which is not set. Set it, or leave the flag out."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key in {flags.judge_key_env} holds characters that a header cannot have. Set it again.")
    caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    cache = Path(flags.judge_cache).expanduser() if flags.judge_cache else Path(caches) / "raftune" / "judge"
    try:
        (cache / "tmp").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--judge-cache must be a folder that can be written; got {cache}: {error.strerror}. Name another."
        ) from error
    endpoint = ChatEndpoint(
        url=chat_url(flags.judge),
        model=flags.judge_model,
        parameters=PARAMETERS | read_object("--judge-parameters", flags.judge_parameters),
        timeout=flags.judge_timeout,
        concurrency=flags.judge_concurrency,
        retries=flags.judge_retries,
        cache=cache,
        key=key or None,
    )
    if (path := flags.judge_prompt) is None:
        return JudgeSpec(endpoint, TEMPLATE)
    try:
        return JudgeSpec(endpoint, check_template(Path(path).read_text(encoding="utf-8"), path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--judge-prompt must name a text file; got {path!r}: {reason}. Check the path.") from error


# -- output ------------------------------------------------------------------------------------------------------------


def show_comparison(comparison: Comparison, number: int, out: str | None) -> None:
    pairs = comparison.pairs
    per_prompt = f"{len(pairs) / len(pairs.prompts):.3g}"
    noun = "completion" if per_prompt == "1" else "completions"
    prompts = counted(len(pairs.prompts), "prompt")
    echo(f"A  {pairs.side_a.words}", f"B  {pairs.side_b.words}")
    echo(f"{counted(len(pairs), 'pair')}: {prompts}, {per_prompt} {noun} each, the same seeds", style="dim")
    for line in comparison.differences:
        echo(f"differs: {line}", style="yellow")
    echo("")
    table = PlainTable("measure", "A", "B", "A - B", "win/tie/loss", "A's win rate", "p", right=(1, 2, 4, 6))
    for measure in comparison.computed:
        assert measure.result is not None
        table.add(one_line(measure.title, 24), *cells(measure.result))
    table.show()
    echo("")
    echo(*notes(comparison), style="dim")
    show_extremes(comparison, number)
    passed = [checked for checked in comparison.gates if not checked.closed]  # those that failed are the error
    if passed or out is not None:
        echo("")
    for checked in passed:
        echo(f"gate passed: {checked.gate.text}: {checked.words}.")
    if out is not None:
        echo(f"Wrote {counted(len(pairs), 'pair')} to {out}.")


def cells(result: PairedTest) -> tuple[str, ...]:
    """The measure's numbers: means and difference in units of the score, shares in per cent."""

    def interval(estimate: PairedEstimate, factor: float, form: str) -> str:
        if estimate.low is None or estimate.high is None:
            return ""
        return f" [{factor * estimate.low:{form}}, {factor * estimate.high:{form}}]"

    means = ["–" if estimate is None else f"{estimate.mean:.3f}" for estimate in (result.a, result.b)]
    lead, rate = result.difference, result.win_rate
    difference = "–" if lead is None else f"{lead.mean:+.3f}{interval(lead, 1, '+.3f')}"
    shares = "/".join(f"{100 * share:.0f}" for share in (result.wins, result.ties, result.losses))
    return *means, difference, f"{shares} %", f"{percent(rate.mean)}{interval(rate, 100, '.0f')}", f"{result.p:.4f}"


def notes(comparison: Comparison) -> Iterator[str]:
    from raftune.evaluation.paired import FEWEST

    results = [measure.result for measure in comparison.computed if measure.result is not None]
    flips = [result.flips for result in results if result.flips is not None]
    signs = f"{flips[0]:,} random choices of signs" if flips else "all choices of signs"
    yield f"[95 % intervals] over prompts; p: sign-flip test on prompts, two-sided, {signs}."
    fewest = min(result.prompts for result in results)
    if fewest < FEWEST:
        few = counted(fewest, "prompt")
        yield f"too few for an interval or for p below 0.05: {few}; compare on {FEWEST} or more."
    for measure in comparison.measures:
        facts, title = measure.facts, measure.title.strip()
        left_out = counted(facts.get("left_out", 0), "pair")
        if measure.result is None:
            yield f"not compared: {title}: {measure.why}."
        if measure.kind != "judge":
            if measure.result is not None and facts.get("left_out"):
                yield f"{title}: {left_out} left out, without a score in A or B."
            continue
        questions = f"{counted(facts['questions'], 'question')} ({facts['cached']} answered from disk)"
        same = counted(facts["identical"], "pair")
        yield f"{measure.title}: {questions}; {same} of identical completions are ties, and were not asked."
        if facts["inconsistent"] is not None:
            first = (
                ""
                if facts["first"] is None
                else f"; {percent(facts['first'])} of its choices were the first completion"
            )
            yield f"  position bias: {percent(facts['inconsistent'])} of verdicts changed with the order{first}."
        if facts["failed"]:
            kinds = ", ".join(f"{count} {kind}" for kind, count in facts["failed"].items())
            yield f"  no verdict: {kinds}; {left_out} left out."


def show_extremes(comparison: Comparison, number: int) -> None:
    """The prompts on which A leads and trails most; both completions too if `number` is above 0."""
    measure = comparison.by.title.strip()
    for title, prompts in zip(("ahead", "behind"), comparison.extremes(number or NAMED), strict=True):
        if not prompts:
            echo("", f"A is {title} on no prompt by {measure}.")
            continue
        echo("", f"A is furthest {title} by {measure} on:")
        for index, lead in prompts:
            prompt, rows = comparison.pairs.prompts[index], int((comparison.pairs.groups == index).sum())
            messages = prompt.content
            text = str(messages[-1].get("content", "")) if isinstance(messages, list) else str(messages)
            mean = f"  mean of {rows} pairs" if number and rows > 1 else ""
            echo(f"  {lead:+7.3f}  {prompt.id}  {one_line(text, 60)}{mean}", style="bold" if number else "")
            if not number:
                continue
            pair = comparison.telling(index, lead)
            if rows > 1:
                _, k, _ = comparison.pairs.keys[pair]
                echo(
                    f"    completion {k} of {rows}, the clearest: {float(comparison.by.leads[pair]):+.3f}", style="dim"
                )
            sides = zip("AB", comparison.pairs.answers, (comparison.by.a, comparison.by.b), strict=True)
            for letter, completions, scores in sides:
                score = "" if scores is None else f"{scores[pair]:.3f}"
                first, *others = harmless(answer_text(completions[pair])).splitlines() or ["(empty)"]
                echo(f"    {letter} {score:>8}  {first}", *(f"{'':>16}{line}" for line in others))
