"""Two prompts, drawn, scored and tuned on: what each stage costs for a sample, and before the first.

All of it within a time: where a model or a reward is slow, fewer tokens are drawn, fewer samples scored and fewer rows
tuned on, and the rest is extrapolated. What was cut short is said.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.build import Assembly
from raftune.config.guards import GuardsConfig
from raftune.digest import generation_words
from raftune.errors import RewardError
from raftune.evaluation.alarms import probe_alarms
from raftune.plain import one_line
from raftune.planning.amounts import Amounts
from raftune.planning.sizes import Peak
from raftune.protocols import Likelihood, Policy, SupportsBackends, Unit
from raftune.records import Prompt, Sample, Score, Status, derive_seed
from raftune.stages.draw import as_table, drawn
from raftune.stages.gather import kept_rows
from raftune.stages.plan import prompts_from
from raftune.store.parquet import read_table, write_table

FAILED = (Status.INVALID, Status.ERROR, Status.TIMEOUT)
ASKED = 2
WIDER = 4  # the second draw is so many times as wide, which tells what a batch costs from what a sample does
SECONDS = 60.0  # that a probe may take, unless it is told otherwise
BRIEF = 12  # tokens of the first draws, which tell how long a token takes
LEAST = 4  # tokens and samples that are tried in any case
# Of the time: for drawing, for each set of rewards, for log-probabilities, for tuning. The rest is for loading.
DRAW, SCORE, LOGP, TUNE = 0.35, 0.1, 0.05, 0.3
LEARNING = 3  # a forward and a backward pass take about so many times the forward pass
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line: `fixed` before the first item, and `each` for every one."""

    fixed: float = 0.0
    each: float = 0.0

    def of(self, items: float, starts: float = 1.0) -> float:
        return self.fixed * starts + self.each * items

    def times(self, factor: float) -> Line:
        return Line(self.fixed * factor, self.each * factor)


@dataclass(frozen=True)
class Probe:
    """What was measured: seconds by stage, tokens or bytes of a sample on average, and what a user should know.

    `tokens` is what the samples came to, or would have, had they been drawn to `max_completion_length`. `cut_short`
    says what was not measured in full.
    """

    load: float
    draw: Line  # a batch, and a sample of it
    score: Line  # a sample
    judge: Line
    logp: Line
    tune: Line  # a fit, and a row
    tokens: float
    size: float | None  # bytes of a picture on average
    notes: tuple[str, ...]
    seconds: float
    cut_short: tuple[str, ...] = ()
    generation: str = ""  # how it generates, in words, where there are several ways
    drawing: Peak | None = None
    tuning: Peak | None = None


@dataclass
class Trial:
    """The probe under way: its time, what it tells meanwhile, and what it had to cut short."""

    seconds: float
    tell: Tell
    began: float = field(default_factory=time.perf_counter)
    cut_short: list[str] = field(default_factory=list)

    def may(self, share: float) -> float:
        """Seconds that a part may take: its share, or what is left."""
        return max(0.0, min(self.seconds * share, self.seconds - (time.perf_counter() - self.began)))


def probe(
    assembly: Assembly,
    data: Path,
    work: Path,
    trial: Trial,
    widths: Sequence[int] = (),
) -> Probe:
    """Runs each stage's work on two prompts, in `work`; raises what the run itself would. `widths`: how many samples of
    each are drawn, first and then; without any, K and then four times as many. Takes about `trial.seconds` at most."""
    tell = trial.tell
    config, folder = assembly.config, assembly.run.folder(0, "model")
    table = read_table(data / ("train.parquet" if config.num_rounds else "held_out.parquet")).slice(0, ASKED)
    prompts = prompts_from(table)
    tell("probe: reading the model, and a first draw")
    policy = assembly.policies.at(folder)
    first = config.sampling.num_generations if config.sampling.generation_kwargs else 1
    trying, backend = timed(lambda: policy.choose_backend(prompts) if isinstance(policy, SupportsBackends) else None)
    with limited(policy, BRIEF):
        load, _ = timed(lambda: drawn(policy, asking(prompts, first, config.seed, config.sampling.batch_size)))
    tell("probe: drawing")
    with watched() as memory:
        draw, found, factor = time_draw(policy, prompts, assembly, widths, trial)
    samples = as_table(found, policy)
    drawing = memory.peak(samples.num_rows, mean_tokens(samples))
    asked = {prompt.id: prompt for prompt in prompts}
    owners = [asked[sample.prompt_id] for sample in found]
    tell("probe: scoring")
    score, scores = time_panel(assembly.panel(), owners, samples, trial)
    refuse_failures(scores, config.rewards.max_failure_fraction)
    judge = time_panel(assembly.judge(), owners, samples, trial)[0] if config.evaluation.reward_funcs else Line()
    longer = factor_of_rows(policy, prompts, mean_tokens(samples), factor)
    logp = time_logp(policy, owners, samples, config.sampling.batch_size, trial).times(longer)
    tune, tuning = Line(), None
    if config.num_rounds:
        tell("probe: tuning")
        tune, tuning = time_tune(assembly, samples, table, work, load, draw.times(1 / factor), trial)
    said = (*policy.notes(), *assembly.panel().notes())
    whole = factor == 1  # else a sample may have ended later, with another score
    notes = (*said, *doubts(scores), *(cut_off(samples, config.tuning.mask_truncated_completions) if whole else ()))
    if config.num_rounds and config.guards.enabled:
        notes += tuple(alarming(config.guards, samples if whole else without_ends(samples), scores))
    return Probe(
        trying + load,
        draw,
        score,
        judge,
        logp,
        tune.times(longer),
        mean_tokens(samples) * factor,
        mean_size(samples),
        notes,
        time.perf_counter() - trial.began,
        tuple(trial.cut_short),
        generation_words(backend) if backend else "",
        drawing,
        tuning,
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


@contextlib.contextmanager
def limited(policy: Any, tokens: int | None) -> Iterator[None]:
    """Within, a policy that counts tokens draws so many at most."""
    usual: Any = getattr(policy, "config", None)
    if tokens is None or "completion_ids" not in policy.payload.names or not hasattr(usual, "sampling"):
        yield
        return
    tokens = min(tokens, usual.sampling.max_completion_length)
    sampling = usual.sampling.model_copy(update={"max_completion_length": tokens})
    policy.config = usual.model_copy(update={"sampling": sampling})
    try:
        yield
    finally:
        policy.config = usual


class Memory:
    """The most memory since the beginning: of tensors on a GPU, else of the process."""

    def __init__(self) -> None:
        torch = sys.modules.get("torch")
        self.cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
        if self.cuda is not None:
            self.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # Linux forgets the peak when it is told to
                Path("/proc/self/clear_refs").write_text("5")
        self.before = self.cuda.memory_allocated() if self.cuda is not None else resident("VmRSS")

    def peak(self, rows: int, tokens: float) -> Peak | None:
        """None where the system does not say."""
        most = self.cuda.max_memory_reserved() if self.cuda is not None else resident("VmHWM")
        return Peak(int(most), int(self.before), rows, tokens) if most else None


@contextlib.contextmanager
def watched() -> Iterator[Memory]:
    yield Memory()


def resident(name: str) -> int:
    """Bytes of the process, now (VmRSS) or at most (VmHWM); 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def asking(prompts: list[Prompt], number: int, seed: int, batch_size: int) -> Unit:
    """A unit of a training round: what is tuned on is drawn."""
    seeds = tuple(tuple(derive_seed("probe", seed, prompt.id, k) for k in range(number)) for prompt in prompts)
    return Unit(0, "0001", "probe", tuple(prompts), seeds, batch_size)


def time_draw(
    policy: Policy, prompts: list[Prompt], assembly: Assembly, chosen: Sequence[int], trial: Trial
) -> tuple[Line, list[Sample], float]:
    """The cost of a batch and of a sample, from two draws of different width; the samples of the wider one; and how
    many times as many tokens they would have, had they been drawn to the end."""
    sampling = assembly.config.sampling
    widths = list(chosen) or [sampling.num_generations, sampling.num_generations * WIDER]
    most = max(1, sampling.batch_size // len(prompts))
    widths = [min(width, most) for width in widths]
    if sampling.generation_kwargs:  # options of `generate`, such as beams, may hang on the number of answers
        widths = [sampling.num_generations]
    widths, longest = list(dict.fromkeys(widths)), sampling.max_completion_length

    def spend(width: int, tokens: int | None) -> tuple[float, list[Sample]]:
        with limited(policy, tokens):
            return timed(lambda: drawn(policy, asking(prompts, width, 0, sampling.batch_size)))

    tokens: int | None = None
    brief, spent = 0, 0.0
    if "completion_ids" in policy.payload.names:
        brief = min(BRIEF, longest)
        spent, _ = spend(widths[0], brief)
        tokens = int(trial.may(DRAW) / (spent / brief) / (sum(widths) / widths[0]))
        if tokens < LEAST and len(widths) > 1:  # not even that of both widths
            widths, tokens = widths[:1], int(trial.may(DRAW) / (spent / brief))
        tokens = min(longest, max(LEAST, tokens))
    seconds: list[float] = []
    found: list[Sample] = []
    for width in widths:
        if seconds and tokens is None and seconds[0] * width / widths[0] > trial.may(DRAW):
            trial.cut_short.append(f"only {len(found)} samples were drawn")
            break
        spent, found = spend(width, tokens)
        seconds.append(spent)
    factor = longer = 1.0
    if tokens is not None and tokens < longest:
        factor = still_to_come(found, tokens, longest)
    if tokens is not None and factor > 1:
        trial.cut_short.append(f"answers were drawn to {tokens} of {longest} tokens")
        # What a token takes beside the prompt, by the two draws of one width; by one of them, where noise denies it.
        token = (spent - seconds[0]) / (brief - tokens) if brief != tokens else 0.0
        longer = 1 + (token if token > 0 else seconds[0] / tokens) * tokens * (factor - 1) / seconds[0]
    if len(seconds) == 1:
        return Line(0.0, seconds[0] / len(found)).times(longer), found, factor
    line = through(widths[0] * len(prompts), seconds[0], widths[1] * len(prompts), seconds[1])
    return line.times(longer), found, factor


def factor_of_rows(policy: Any, prompts: list[Prompt], tokens: float, factor: float) -> float:
    """How many times as many tokens, those of the prompt included, a row will have as in the probe."""
    if factor == 1:
        return 1.0
    asked = sum(map(len, policy.encoder.encode(prompts, for_drawing=True))) / len(prompts)
    return (asked + tokens * factor) / (asked + tokens)


def still_to_come(samples: Sequence[Sample], limit: int, longest: int) -> float:
    """How many times as long the samples would be: those that reached the limit count with `longest` tokens."""
    lengths = np.array([len(sample.payload["completion_ids"]) for sample in samples], dtype=np.float64)
    return float(np.where(lengths >= limit, longest, lengths).sum() / lengths.sum())


def through(n1: int, t1: float, n2: int, t2: float) -> Line:
    """The line through two measurements, kept from going below 0 by noise."""
    each = max(0.0, (t2 - t1) / (n2 - n1))
    return Line(max(0.0, t1 - each * n1), each) if each else Line(min(t1, t2), 0.0)


def time_panel(panel: Any, prompts: list[Prompt], samples: pa.Table, trial: Trial) -> tuple[Line, list[Score]]:
    """The first call may load a model or start a process: that is the fixed part. Beside it, what was scored."""
    first, _ = timed(lambda: panel.score_samples(prompts[:1], samples.slice(0, 1)))
    each, _ = timed(lambda: panel.score_samples(prompts[1:2], samples.slice(1, 1)))
    number = min(len(prompts), max(LEAST, int(trial.may(SCORE) / max(each, 1e-6))))
    if number < len(prompts):
        trial.cut_short.append(f"{number} of {len(prompts)} samples were scored")
    every, scores = timed(lambda: panel.score_samples(prompts[:number], samples.slice(0, number)))
    return Line(first, every / number), scores


def refuse_failures(scores: list[Score], limit: float) -> None:
    """Raises RewardError, with an example, where so many samples failed that the run would stop."""
    failed = [score for score in scores if score.status in FAILED]
    if len(failed) <= limit * len(scores):
        return
    example = next(f"{name}: {part.detail}" for name, part in failed[0].parts.items() if part.status in FAILED)
    raise RewardError(
        f"rewards: {len(failed)} of {len(scores)} tried samples could not be scored; rewards.max_failure_fraction "
        f"allows {limit:g}. For example {example}. `raftune reward check` tells more."
    )


def without_ends(samples: pa.Table) -> pa.Table:
    """The samples without how they ended, where that was up to the probe."""
    return samples.drop_columns([name for name in ("finish",) if name in samples.column_names])


def alarming(guards: GuardsConfig, samples: pa.Table, scores: list[Score]) -> list[str]:
    """The alarms that a round of such samples would raise."""
    scored = samples.slice(0, len(scores))
    scored = scored.append_column("score", pa.array([score.value for score in scores], pa.float64()))
    return [
        one_line(f"a round of such samples raises an alarm: {alarm['title']}: {alarm['evidence']}")
        for alarm in probe_alarms(scored, guards)
    ]


def doubts(scores: list[Score]) -> list[str]:
    """What the tried samples' scores say against learning from them."""
    said = []
    values = [score.value for score in scores if score.value is not None]
    if failed := sum(score.status in FAILED for score in scores):
        said.append(f"{failed} of {len(scores)} tried samples could not be scored: `raftune reward check` tells more")
    if len(values) > 1 and min(values) == max(values):
        said.append(f"all tried samples scored {values[0]:g}: there may be nothing to rank")
    return said


def cut_off(samples: pa.Table, masked: bool) -> list[str]:
    """What it says against the length of answers that every tried one was cut off, where such are not learned from."""
    finish = samples.column("finish").to_pylist() if masked and "finish" in samples.column_names else []
    if not finish or set(finish) != {"length"}:
        return []
    return [
        f"all {len(finish)} tried samples were cut off at max_completion_length, and tuning.mask_truncated_completions "
        "leaves such out: there may be nothing to learn from"
    ]


def time_logp(policy: Policy, prompts: list[Prompt], samples: pa.Table, batch_size: int, trial: Trial) -> Line:
    if not isinstance(policy, Likelihood):
        return Line()
    few = min(LEAST, len(prompts))
    brief, _ = timed(lambda: policy.log_probs(prompts[:few], samples.slice(0, few), batch_size))
    if brief / few * len(prompts) > trial.may(LOGP):
        return Line(0.0, brief / few)
    spent, _ = timed(lambda: policy.log_probs(prompts, samples, batch_size))
    return Line(0.0, spent / len(prompts))


def time_tune(
    assembly: Assembly, samples: pa.Table, prompts: pa.Table, work: Path, load: float, draw: Line, trial: Trial
) -> tuple[Line, Peak | None]:
    """Two fits of one pass, over a batch of rows and over as many as there are, or as there is time for; and the memory
    of the first."""
    batch = min(assembly.config.tuning.per_device_train_batch_size, samples.num_rows)
    row = LEARNING * draw.each  # seconds of a row, before any was tuned on
    rows = min(batch, max(1, int(trial.may(TUNE) / max(row, 1e-9))))
    if rows < batch:
        trial.cut_short.append(f"a step was taken with {rows} of {batch} rows")
    once = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": 1, "optimizer_state": "fresh"}
    once |= {"mask_truncated_completions": False}  # two prompts may give none that ends, and cost as much to tune on
    once |= {"per_device_train_batch_size": rows, "save_steps": None}
    usual = assembly.policies.config
    tuning = usual.tuning.model_copy(update=once)
    assembly.policies.config = usual.model_copy(update={"tuning": tuning})
    try:
        assembly.policies.release()
        with watched() as memory:
            first = fit(assembly, samples.slice(0, rows), prompts, work / "tune-first")
        peak = memory.peak(rows, mean_tokens(samples))
        step = max(first - load, 0.0)
        steps = min(samples.num_rows // rows, int((trial.may(TUNE) - load) / max(step, 1e-6)))
        if steps < 2:
            return Line(first - step, step / rows), peak
        second = fit(assembly, samples.slice(0, steps * rows), prompts, work / "tune-second")
    finally:
        assembly.policies.config = usual
    return through(rows, first, steps * rows, second), peak


def fit(assembly: Assembly, samples: pa.Table, prompts: pa.Table, work: Path) -> float:
    """Seconds of one fit to these samples, the loading of the model included."""
    for name in ("work", "out"):
        (work / name).mkdir(parents=True)
    rows = kept_rows(samples, np.ones(samples.num_rows), prompts, 1)
    write_table(rows, work / "rows.parquet", {"raftune.round": "1"})
    policy = assembly.policies.fresh(assembly.run.folder(0, "model"))
    return timed(lambda: policy.tune(work / "rows.parquet", work / "work", work / "out"))[0]


def mean_tokens(samples: pa.Table) -> float:
    if "completion_ids" not in samples.column_names:
        return 0.0
    lengths = [len(ids) for ids in samples.column("completion_ids").to_pylist()]
    return sum(lengths) / len(lengths)


def mean_size(samples: pa.Table) -> float | None:
    """Bytes of a completion that is a picture; None for any other."""
    if samples.schema.field("completion").type != pa.binary():
        return None
    sizes = [len(png) for png in samples.column("completion").to_pylist() if png is not None]
    return sum(sizes) / len(sizes) if sizes else None


def seconds_by_stage(found: Probe, planned: Amounts, assembly: Assembly) -> dict[str, float]:
    """Seconds of the whole run by kind of work, in this process."""
    config, rounds = assembly.config, planned.rounds
    wide = config.sampling.batch_size
    judged = (rounds + 1) * planned.judged
    batches = rounds * math.ceil(planned.drawn / wide) + (rounds + 1) * math.ceil(planned.judged / wide)
    kl = config.evaluation.kl and assembly.knows_likelihood()
    compared = 2 * judged * kl + 2 * rounds * planned.competing * (config.selection.beta > 0)
    batch = config.tuning.per_device_train_batch_size * config.tuning.gradient_accumulation_steps
    return {
        "drawing": found.load * (2 * rounds + 1) + found.draw.of(planned.samples, batches),
        "scoring": found.score.of(rounds * planned.competing + judged) + found.judge.of(judged),
        "log-probabilities": found.logp.of(compared, 0),
        "tuning": found.tune.of(rounds * planned.steps * batch, rounds),
    }
