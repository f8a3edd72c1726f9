"""Measures the cost of each stage with two prompts.

The probe has a time limit. For a slow model or reward it generates fewer tokens, scores fewer samples and trains on
fewer rows, and extrapolates. The forecast says what was shortened and what was not measured.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.config.guards import GuardsConfig
from raftune.errors import RewardError
from raftune.evaluation.alarms import probe_alarms
from raftune.policies.footprint import MeasuredPeak, RoundAmounts
from raftune.protocols import Chunk, Policy, SupportsBackends, SupportsLogProbs
from raftune.records import Prompt, Sample, Score, ScoreStatus, derive_seed
from raftune.runtime.assembly import Runtime
from raftune.sanitize import counted, one_line
from raftune.stages.gather import with_prompts
from raftune.stages.generate import as_table, drawn
from raftune.stages.parity import generation_words
from raftune.stages.plan import prompts_from
from raftune.store.interruption import interrupting
from raftune.store.parquet import read_table, write_table
from raftune.training.objectives import chosen_rows, load_objective

FAILED = (ScoreStatus.INVALID, ScoreStatus.ERROR, ScoreStatus.TIMEOUT)
ASKED = 2
WIDER = 4  # the second sample is so many times as wide, which tells what a batch costs from what a sample does
SECONDS = 60.0  # that a probe may take, unless it is told otherwise
BRIEF = 12  # tokens of the sample that tells how long a token takes
LEAST = 4  # tokens, and samples to score, below which a trial tells little
# Of the time: for generating, for each set of rewards, for log-probabilities, for training. The rest is for loading.
DRAW, SCORE, LOGP, TUNE = 0.35, 0.1, 0.05, 0.3
LEARNING = 3  # a forward and a backward pass take about so many times the forward pass
Emit = Callable[[str], None]


@dataclass(frozen=True)
class LinearTime:
    """A linear model of seconds: `fixed`, and `each` per item."""

    fixed: float = 0.0
    each: float = 0.0

    def of(self, items: float, starts: float = 1.0) -> float:
        return self.fixed * starts + self.each * items

    def times(self, factor: float) -> LinearTime:
        return LinearTime(self.fixed * factor, self.each * factor)


@dataclass
class ProbeResult:
    """What was measured, filled as it goes: seconds by stage, tokens or bytes of a sample on average, and what a user
    should know. None is what there was no time for; `missing` names it.

    `tokens` is what the samples came to, or would have, had they been generated to `max_completion_length`. `cut_short`
    says what was not measured in full.
    """

    load: float | None = None
    generate: LinearTime | None = None  # a batch, and a sample of it
    score: LinearTime | None = None  # a sample
    judge: LinearTime | None = None
    logp: LinearTime | None = None
    train: LinearTime | None = None  # a fit, and a row
    tokens: float | None = None
    size: float | None = None  # bytes of an image on average
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    limit: float = SECONDS
    cut_short: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    generation: str = ""  # how it generates, in words, where there are several ways
    drawing: MeasuredPeak | None = None
    training: MeasuredPeak | None = None


class TimeUp(KeyboardInterrupt):
    """The probe's time is over. A KeyboardInterrupt, so that user code does not catch it."""


@dataclass
class ProbeRun:
    """The time that a plan may take for reading the model and trying it, and what it tells meanwhile."""

    seconds: float
    tell: Emit
    began: float = field(default_factory=time.perf_counter)
    cut_short: list[str] = field(default_factory=list)
    shared: float = 0.0  # seconds that were left when the probe began, of which each part has its share

    def spent(self) -> float:
        return time.perf_counter() - self.began

    def left(self) -> float:
        return self.seconds - self.spent()

    def may(self, share: float) -> float:
        """Seconds that a part may take: its share, or what is left."""
        return max(0.0, min(self.shared * share, self.left()))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - began

    def ended(self, call: Callable[[], None]) -> bool:
        """Makes the call, and ends it where the time is up, wherever it is; whether it was ended.

        By the alarm of the system, and so between two operations of Python on the main thread. Where there is no such
        alarm (Windows, another thread), the call goes on to its next look at the time.
        """
        if self.left() <= 0:
            return True
        fired: list[bool] = []

        def ring(number: int, frame: FrameType | None) -> None:
            fired.append(True)
            raise TimeUp

        try:
            with alarm(self.left(), ring):
                call()
        except BaseException as error:
            if (fired or isinstance(error, TimeUp)) and interrupting(error) is not None:
                return True
            raise
        return bool(fired)

    def check(self) -> None:
        if self.left() <= 0:
            raise TimeUp


@contextlib.contextmanager
def alarm(seconds: float, ring: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Rings after so many seconds and, as foreign code may swallow it, every second from then on. An alarm that was set
    before rings afterwards."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    earlier, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if earlier:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, earlier - (time.monotonic() - began)), interval)


def probe(assembly: Runtime, data: Path, work: Path, trial: ProbeRun, widths: Sequence[int] = ()) -> ProbeResult:
    """Runs each stage's work on two prompts, in `work`; raises what the run itself would. `widths`: how many samples of
    each are generated, first and then; without any, K and then four times as many. It is over when the trial's time
    is."""
    found, config = ProbeResult(limit=trial.seconds), assembly.config
    trial.shared = trial.left()

    if trial.ended(lambda: try_stages(found, assembly, data, work, trial, widths)):
        assembly.policies.release()
    compared = assembly.has_log_probs() and (config.evaluation.kl or config.selection.beta > 0)
    parts = (
        ("generating", found.generate, True),
        ("scoring", found.score, True),
        ("scoring of evaluations", found.judge, bool(config.evaluation.reward_funcs)),
        ("log-probabilities", found.logp, compared),
        ("training", found.train, config.num_rounds > 0),
    )
    found.missing = tuple(name for name, line, needed in parts if needed and line is None)
    found.cut_short = tuple(trial.cut_short)
    found.seconds = trial.spent()
    return found


def try_stages(
    found: ProbeResult, assembly: Runtime, data: Path, work: Path, trial: ProbeRun, widths: Sequence[int]
) -> None:
    """The work of `probe`: each result is entered as soon as it is there."""
    tell = trial.tell
    config, folder = assembly.config, assembly.run.folder(0, "model")
    table = read_table(data / ("train.parquet" if config.num_rounds else "held_out.parquet")).slice(0, ASKED)
    prompts = prompts_from(table)
    tell("probe: loading the model, first generation")
    policy = assembly.policies.at(folder)
    first = config.sampling.num_generations if config.sampling.generation_kwargs else 1
    trying, backend = timed(lambda: policy.choose_backend(prompts) if isinstance(policy, SupportsBackends) else None)
    found.generation = generation_words(backend) if backend else ""
    chunk = asking(prompts[:1], first, config.seed, config.sampling.batch_size)
    with limited(policy, 1):
        cold, _ = timed(lambda: drawn(policy, chunk))
        token, _ = timed(lambda: drawn(policy, chunk))
    found.load = trying + max(0.0, cold - token)
    trial.check()
    tell("probe: generating")
    with watched() as memory:
        drawn_samples, factor = time_draw(found, policy, prompts, assembly, widths, trial, token / first)
    samples = as_table(drawn_samples, policy)
    found.drawing = memory.peak(samples.num_rows, mean_tokens(samples))
    found.size = mean_size(samples)
    found.notes = policy.notes()
    trial.check()
    asked = {prompt.id: prompt for prompt in prompts}
    owners = [asked[sample.prompt_id] for sample in drawn_samples]
    tell("probe: scoring")
    found.score, scores = time_panel(assembly.panel(), owners, samples, trial)
    refuse_failures(scores, config.rewards.max_failure_fraction)
    whole = factor == 1  # else a sample may have ended later, with another score
    found.notes += (*assembly.panel().notes(), *doubts(scores))
    found.notes += tuple(cut_off(samples, config.training.mask_truncated_completions)) if whole else ()
    if config.num_rounds and config.guards.enabled:
        found.notes += tuple(alarming(config.guards, samples if whole else without_ends(samples), scores))
    trial.check()
    found.judge = (
        time_panel(assembly.judge(), owners, samples, trial)[0] if config.evaluation.reward_funcs else LinearTime()
    )
    trial.check()
    longer = factor_of_rows(policy, prompts, mean_tokens(samples), factor)
    found.logp = time_logp(policy, owners, samples, config.sampling.batch_size, trial).times(longer)
    trial.check()
    if not config.num_rounds:
        found.train = LinearTime()
    else:
        tell("probe: training")
        time_tune(found, assembly, samples, table, work, factor, longer, trial)


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


class MemoryMeter:
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

    def peak(self, rows: int, tokens: float) -> MeasuredPeak | None:
        """None where the system does not say."""
        most = self.cuda.max_memory_reserved() if self.cuda is not None else resident("VmHWM")
        return MeasuredPeak(int(most), int(self.before), rows, tokens) if most else None


@contextlib.contextmanager
def watched() -> Iterator[MemoryMeter]:
    yield MemoryMeter()


def resident(name: str) -> int:
    """Bytes of the process, now (VmRSS) or at most (VmHWM); 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def asking(prompts: list[Prompt], number: int, seed: int, batch_size: int) -> Chunk:
    """A chunk of a training round."""
    seeds = tuple(tuple(derive_seed("probe", seed, prompt.id, k) for k in range(number)) for prompt in prompts)
    return Chunk(0, "0001", "probe", tuple(prompts), seeds, batch_size)


def time_draw(
    found: ProbeResult,
    policy: Policy,
    prompts: list[Prompt],
    assembly: Runtime,
    chosen: Sequence[int],
    trial: ProbeRun,
    single: float,
) -> tuple[list[Sample], float]:
    """The cost of a batch and of a sample, from two generations of different width. Returns the samples of the wider,
    and how many times as many tokens they would have, had they been generated to the end.

    `single`: seconds of one sample, of one token where there are tokens. No sample is begun that would take longer than
    there is time for, if many samples at once were no faster than one by one.
    """
    sampling = assembly.config.sampling
    widths = list(chosen) or [sampling.num_generations, sampling.num_generations * WIDER]
    most = max(1, sampling.batch_size // len(prompts))
    widths = [min(width, most) for width in widths]
    longest, tokens, counts = sampling.max_completion_length, None, "completion_ids" in policy.payload.names
    if sampling.generation_kwargs:  # options of `generate`, such as beams, may hang on the number of answers
        widths = [sampling.num_generations]

    def spend(width: int, tokens: int | None) -> tuple[float, list[Sample]]:
        with limited(policy, tokens):
            return timed(lambda: drawn(policy, asking(prompts, width, 0, sampling.batch_size)))

    def enter(seconds: list[float], samples: list[Sample], tokens: int | None, token: float) -> float:
        factor = longer = 1.0
        if tokens is not None and tokens < longest:
            factor = still_to_come(samples, tokens, longest)
        if tokens is not None and factor > 1:
            longer = 1 + token * tokens * (factor - 1) / seconds[0]
        found.tokens = mean_tokens(as_table(samples, policy)) * factor
        line = LinearTime(0.0, seconds[0] / len(samples))
        if len(seconds) > 1:
            line = through(widths[0] * len(prompts), seconds[0], widths[1] * len(prompts), seconds[1])
        found.generate = line.times(longer)
        return factor

    until = time.perf_counter() + trial.may(DRAW)

    def may() -> float:
        return max(0.0, until - time.perf_counter())

    brief = min(BRIEF, longest) if counts else 1
    sample = single * brief
    if brief > 1 and sample < may() / 4:
        with limited(policy, brief):
            sample, _ = timed(lambda: drawn(policy, asking(prompts[:1], 1, 0, sampling.batch_size)))
    rows = int((may() / 2 if counts else may()) / max(sample, 1e-9))
    if rows < 1:
        brief = min(brief, max(1, int(may() / max(single, 1e-9))))
    if rows < len(prompts):
        prompts = prompts[:1]
    if rows < len(prompts) * widths[0] and not sampling.generation_kwargs:
        narrow = max(1, rows // len(prompts))
        widths = [narrow * width // widths[0] for width in widths]
    widths = list(dict.fromkeys(widths))
    if counts:
        spent, samples = spend(widths[0], brief)
        factor = enter([spent], samples, brief, spent / brief)
        tokens = int(may() / (spent / brief) / (sum(widths) / widths[0]))
        if tokens < LEAST and len(widths) > 1:  # not even that of both widths
            widths, tokens = widths[:1], int(may() / (spent / brief))
        tokens = min(longest, tokens)
        if tokens <= brief and len(widths) == 1:  # there is no time for more than that
            trial.cut_short += [f"answers were generated to {brief} of {longest} tokens"] * (factor > 1)
            return samples, factor
        tokens = max(tokens, min(LEAST, longest))
    seconds: list[float] = []
    for width in widths:
        if seconds and tokens is None and seconds[0] * width / widths[0] > may():
            trial.cut_short.append(
                f"only {counted(len(samples), 'sample')} {'was' if len(samples) == 1 else 'were'} generated"
            )
            break
        wide, samples = spend(width, tokens)
        seconds.append(wide)
        # What a token takes beside the prompt, by the two generations of one width; by one of them, where noise denies
        # it.
        token = (spent - seconds[0]) / (brief - tokens) if tokens is not None and brief != tokens else 0.0
        factor = enter(seconds, samples, tokens, token if token > 0 else seconds[0] / (tokens or 1))
    if tokens is not None and factor > 1:
        trial.cut_short.append(f"answers were generated to {tokens} of {longest} tokens")
    return samples, factor


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


def through(n1: int, t1: float, n2: int, t2: float) -> LinearTime:
    """The line through two measurements, kept from going below 0 by noise."""
    each = max(0.0, (t2 - t1) / (n2 - n1))
    return LinearTime(max(0.0, t1 - each * n1), each) if each else LinearTime(min(t1, t2), 0.0)


def time_panel(panel: Any, prompts: list[Prompt], samples: pa.Table, trial: ProbeRun) -> tuple[LinearTime, list[Score]]:
    """The first call may load a model or start a process: that is the fixed part. Beside it, what was scored."""
    first, _ = timed(lambda: panel.score_samples(prompts[:1], samples.slice(0, 1)))
    last = len(prompts) - 1
    each, _ = timed(lambda: panel.score_samples(prompts[last:], samples.slice(last, 1)))
    number = min(len(prompts), max(LEAST, int(trial.may(SCORE) / max(each, 1e-6))))
    if number < len(prompts):
        trial.cut_short.append(f"{number} of {len(prompts)} samples were scored")
    every, scores = timed(lambda: panel.score_samples(prompts[:number], samples.slice(0, number)))
    return LinearTime(first, every / number), scores


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
        f"all {len(finish)} tried samples were cut off at max_completion_length, and "
        f"training.mask_truncated_completions "
        "leaves such out: there may be nothing to learn from"
    ]


def time_logp(policy: Policy, prompts: list[Prompt], samples: pa.Table, batch_size: int, trial: ProbeRun) -> LinearTime:
    if not isinstance(policy, SupportsLogProbs):
        return LinearTime()
    few = min(LEAST, len(prompts))
    brief, _ = timed(lambda: policy.log_probs(prompts[:few], samples.slice(0, few), batch_size))
    if brief / few * len(prompts) > trial.may(LOGP):
        return LinearTime(0.0, brief / few)
    spent, _ = timed(lambda: policy.log_probs(prompts, samples, batch_size))
    return LinearTime(0.0, spent / len(prompts))


def time_tune(
    found: ProbeResult,
    assembly: Runtime,
    samples: pa.Table,
    prompts: pa.Table,
    work: Path,
    factor: float,
    longer: float,
    trial: ProbeRun,
) -> None:
    """Two fits of one pass, over a batch of rows and over as many as there are, or as there is time for; and the memory
    of the first."""
    assert found.generate is not None and found.load is not None
    batch = min(assembly.config.training.per_device_train_batch_size, samples.num_rows)
    row = LEARNING * found.generate.each / factor  # seconds of a row, before any was trained on
    rows = min(batch, max(1, int((trial.may(TUNE) - found.load) / max(row, 1e-9))))
    if rows < batch:
        trial.cut_short.append(f"a step was taken with {rows} of {batch} rows")
    once = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": 1, "optimizer_state": "fresh"}
    once |= {"mask_truncated_completions": False}  # two prompts may give none that ends, and cost as much to tune on
    once |= {"per_device_train_batch_size": rows, "save_steps": None}
    usual = assembly.policies.config
    training = usual.training.model_copy(update=once)
    assembly.policies.config = usual.model_copy(update={"training": training})
    try:
        assembly.policies.release()
        with watched() as memory:
            first = fit(assembly, samples.slice(0, rows), prompts, work / "tune-first")
        found.training = memory.peak(rows, mean_tokens(samples))
        step = max(first - found.load, 0.0)
        found.train = LinearTime(first - step, step / rows).times(longer)
        steps = min(samples.num_rows // rows, int((trial.may(TUNE) - found.load) / max(step, 1e-6)))
        if steps >= 2:
            second = fit(assembly, samples.slice(0, steps * rows), prompts, work / "tune-second")
            found.train = through(rows, first, steps * rows, second).times(longer)
    finally:
        assembly.policies.config = usual


def fit(assembly: Runtime, samples: pa.Table, prompts: pa.Table, work: Path) -> float:
    """Seconds of one fit to these samples, the loading of the model included."""
    for name in ("work", "out"):
        (work / name).mkdir(parents=True)
    objective, count = load_objective(assembly.config.training), samples.num_rows
    verdicts = {
        "sample_id": samples.column("sample_id"),
        "weight": np.full(count, float("kept" in objective.needs)),
        "score": np.zeros(count),
        "rank": np.ones(count, np.int32),
        "reason": [""] * count,
    }
    chosen = chosen_rows(objective, assembly.config.training.objective, samples, pa.table(verdicts))
    rows = with_prompts(chosen, prompts, 1)
    write_table(rows, work / "rows.parquet", {"raftune.round": "1"})
    policy = assembly.policies.fresh(assembly.run.folder(0, "model"))
    return timed(lambda: policy.train(work / "rows.parquet", work / "work", work / "out"))[0]


def mean_tokens(samples: pa.Table) -> float:
    if "completion_ids" not in samples.column_names:
        return 0.0
    lengths = [len(ids) for ids in samples.column("completion_ids").to_pylist()]
    return sum(lengths) / len(lengths)


def mean_size(samples: pa.Table) -> float | None:
    """Bytes of a completion that is an image; None for any other."""
    if samples.schema.field("completion").type != pa.binary():
        return None
    sizes = [len(png) for png in samples.column("completion").to_pylist() if png is not None]
    return sum(sizes) / len(sizes) if sizes else None


def seconds_by_stage(found: ProbeResult, planned: RoundAmounts, assembly: Runtime) -> dict[str, float]:
    """Seconds of the whole run by kind of work, in this process; without the kinds that were not measured."""
    config, rounds = assembly.config, planned.rounds
    wide = config.sampling.batch_size
    judged = (rounds + 1) * planned.judged
    batches = rounds * math.ceil(planned.drawn / wide) + (rounds + 1) * math.ceil(planned.judged / wide)
    kl = config.evaluation.kl and assembly.has_log_probs()
    compared = 2 * judged * kl + 2 * rounds * planned.competing * (config.selection.beta > 0)
    batch = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    seconds: dict[str, float] = {}
    if found.generate is not None:
        seconds["generating"] = (found.load or 0.0) * (2 * rounds + 1) + found.generate.of(planned.samples, batches)
    if found.score is not None:
        seconds["scoring"] = found.score.of(rounds * planned.competing + judged)
        seconds["scoring"] += found.judge.of(judged) if found.judge is not None else 0.0
    if found.logp is not None:
        seconds["log-probabilities"] = found.logp.of(compared, 0)
    if found.train is not None:
        seconds["training"] = found.train.of(rounds * planned.steps * batch, rounds)
    return seconds
