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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.config.run import RunConfig
from raftune.errors import RewardError
from raftune.evaluation.alarms import probe_alarms
from raftune.policies.footprint import MeasuredPeak, RoundAmounts
from raftune.protocols import Chunk, Policy, SupportsBackends, SupportsLogProbs
from raftune.records import Prompt, Sample, Score, ScoreStatus, derive_seed
from raftune.runtime.assembly import Runtime
from raftune.sanitize import counted, one_line
from raftune.stages.gather import with_prompts
from raftune.stages.generate import as_table, generate_samples
from raftune.stages.parity import generation_words
from raftune.stages.plan import prompts_from
from raftune.store.interruption import interrupting
from raftune.store.parquet import read_table, write_table
from raftune.training.objectives import chosen_rows, load_objective

FAILED = (ScoreStatus.INVALID, ScoreStatus.ERROR, ScoreStatus.TIMEOUT)
PROMPTS = 2
WIDER = 4  # the second generation is so many times as wide: this separates the cost of a batch from that of a sample
SECONDS = 60.0  # the default time limit
BRIEF = 12  # tokens of the generation that measures the time of a token
LEAST = 4  # tokens, and samples to score, below which a measurement says little
# Shares of the time: generating, each set of rewards, log-probabilities, training. The rest is for loading.
DRAW, SCORE, LOGP, TRAIN = 0.35, 0.1, 0.05, 0.3
BACKWARD = 3  # a forward and a backward pass take about so many times the forward pass
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
    """Seconds by stage, filled as they are measured; None is what there was no time for, and `missing` names it.

    `tokens`: the mean length of a completion, extrapolated to `max_completion_length`. `cut_short`: what was not
    measured in full.
    """

    load: float | None = None
    generate: LinearTime | None = None  # a batch, and a sample of it
    score: LinearTime | None = None  # a sample
    judge: LinearTime | None = None
    logp: LinearTime | None = None
    train: LinearTime | None = None  # a fit, and a row
    tokens: float | None = None
    size: float | None = None  # mean bytes of an image
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
    """The clock of a plan: `seconds` for reading the model and for the probe together (infinite without a probe)."""

    seconds: float
    tell: Emit
    began: float = field(default_factory=time.perf_counter)
    cut_short: list[str] = field(default_factory=list)
    shared: float = 0.0  # seconds left when the probe began, of which each part has its share

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def may(self, share: float) -> float:
        """Seconds that a part may take: its share, or what is left."""
        return max(0.0, min(self.shared * share, self.left()))

    def check(self) -> None:
        if self.left() <= 0:
            raise TimeUp

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, time does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - began

    def ended(self, call: Callable[[], None]) -> bool:
        """Makes the call and interrupts it when the time is up; returns whether it was interrupted.

        SIGALRM interrupts between two Python operations on the main thread. Where there is none (Windows, another
        thread), the call goes on to its next `check`.
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


@contextlib.contextmanager
def alarm(seconds: float, ring: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Calls `ring` after so many seconds and then every second, as foreign code may swallow it. An alarm that was set
    before is restored."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not hasattr(signal, "setitimer") or not on_main_thread or math.isinf(seconds):
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


class MemoryMeter:
    """Peak memory since its creation: of tensors on a GPU, else of the process."""

    def __init__(self) -> None:
        torch = sys.modules.get("torch")
        self.cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
        if self.cuda is not None:
            self.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # on Linux this resets the peak
                Path("/proc/self/clear_refs").write_text("5")
        self.before = self.cuda.memory_allocated() if self.cuda is not None else resident("VmRSS")

    def peak(self, samples: pa.Table, rows: int) -> MeasuredPeak | None:
        """None where the system does not say."""
        most = self.cuda.max_memory_reserved() if self.cuda is not None else resident("VmHWM")
        return MeasuredPeak(int(most), int(self.before), rows, mean_tokens(samples)) if most else None


def resident(name: str) -> int:
    """Bytes of the process, now (VmRSS) or at most (VmHWM); 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def probe(runtime: Runtime, data: Path, work: Path, trial: ProbeRun) -> ProbeResult:
    """Runs each stage's work on two prompts, in `work`, until the trial's time is up; raises what the run would."""
    result, config = ProbeResult(limit=trial.seconds), runtime.config
    trial.shared = trial.left()
    if trial.ended(lambda: _measure(result, runtime, data, work, trial)):
        runtime.policies.release()
    compared = runtime.has_log_probs() and (config.evaluation.kl or config.selection.beta > 0)
    parts = (
        ("generating", result.generate, True),
        ("scoring", result.score, True),
        ("scoring of evaluations", result.judge, bool(config.evaluation.reward_funcs)),
        ("log-probabilities", result.logp, compared),
        ("training", result.train, config.num_rounds > 0),
    )
    result.missing = tuple(name for name, measured, needed in parts if needed and measured is None)
    result.cut_short = tuple(trial.cut_short)
    result.seconds = trial.seconds - trial.left()
    return result


def _measure(result: ProbeResult, runtime: Runtime, data: Path, work: Path, trial: ProbeRun) -> None:
    """Each measurement enters `result` as soon as it is there: the call may be interrupted at any time."""
    config, batch_size = runtime.config, runtime.config.sampling.batch_size
    table = read_table(data / ("train.parquet" if config.num_rounds else "held_out.parquet")).slice(0, PROMPTS)
    prompts = prompts_from(table)
    trial.tell("probe: loading the model, first generation")
    policy = runtime.policies.at(runtime.run.folder(0, "model"))
    trying, backend = timed(lambda: policy.choose_backend(prompts) if isinstance(policy, SupportsBackends) else None)
    result.generation = generation_words(backend) if backend else ""
    first = config.sampling.num_generations if config.sampling.generation_kwargs else 1
    with limited(policy, 1):
        cold, _ = timed(lambda: generate_samples(policy, chunk_of(prompts[:1], first, config.seed, batch_size)))
        token, _ = timed(lambda: generate_samples(policy, chunk_of(prompts[:1], first, config.seed, batch_size)))
    result.load = trying + max(0.0, cold - token)
    trial.check()

    trial.tell("probe: generating")
    memory = MemoryMeter()
    generated, factor = time_generation(result, policy, prompts, config, trial, token / first)
    samples = as_table(generated, policy)
    result.drawing = memory.peak(samples, samples.num_rows)
    if samples.schema.field("completion").type == pa.binary():
        sizes = [len(image) for image in samples.column("completion").to_pylist() if image is not None]
        result.size = sum(sizes) / len(sizes) if sizes else None
    result.notes = policy.notes()
    trial.check()

    trial.tell("probe: scoring")
    by_id = {prompt.id: prompt for prompt in prompts}
    owners = [by_id[sample.prompt_id] for sample in generated]
    result.score, scores = time_rewards(runtime.panel(), owners, samples, trial)
    failed = [score for score in scores if score.status in FAILED]
    if len(failed) > config.rewards.max_failure_fraction * len(scores):
        example = next(f"{name}: {part.detail}" for name, part in failed[0].parts.items() if part.status in FAILED)
        raise RewardError(
            f"rewards: {len(failed)} of {len(scores)} tried samples could not be scored; rewards.max_failure_fraction "
            f"allows {config.rewards.max_failure_fraction:g}. For example {example}. `raftune reward check` tells more."
        )
    result.notes += (*runtime.panel().notes(), *sample_notes(config, samples, scores, whole=factor == 1))
    trial.check()
    judged = bool(config.evaluation.reward_funcs)
    result.judge = time_rewards(runtime.judge(), owners, samples, trial)[0] if judged else LinearTime()
    trial.check()

    longer = 1.0  # tokens of a row in the run, those of the prompt included, over those in the probe
    if factor != 1:
        lengths = policy.encoder.encode(prompts, for_drawing=True)  # type: ignore[attr-defined]
        asked, tokens = sum(map(len, lengths)) / len(prompts), mean_tokens(samples)
        longer = (asked + tokens * factor) / (asked + tokens)
    seconds = 0.0
    if isinstance(policy, SupportsLogProbs):
        few = min(LEAST, len(owners))
        seconds = timed(lambda: policy.log_probs(owners[:few], samples.slice(0, few), batch_size))[0] / few
        if seconds * len(owners) <= trial.may(LOGP):
            seconds = timed(lambda: policy.log_probs(owners, samples, batch_size))[0] / len(owners)
    result.logp = LinearTime(0.0, seconds * longer)
    trial.check()
    if not config.num_rounds:
        result.train = LinearTime()
        return
    trial.tell("probe: training")
    time_training(result, runtime, samples, table, work, factor, longer, trial)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


@contextlib.contextmanager
def limited(policy: Any, tokens: int | None) -> Iterator[None]:
    """Within, a policy that counts tokens generates so many at most."""
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


def chunk_of(prompts: list[Prompt], number: int, seed: int, batch_size: int) -> Chunk:
    """A chunk of a training round."""
    seeds = tuple(tuple(derive_seed("probe", seed, prompt.id, k) for k in range(number)) for prompt in prompts)
    return Chunk(0, "0001", "probe", tuple(prompts), seeds, batch_size)


def time_generation(
    result: ProbeResult,
    policy: Policy,
    prompts: list[Prompt],
    config: RunConfig,
    trial: ProbeRun,
    single: float,
) -> tuple[list[Sample], float]:
    """Measures a batch and a sample by two generations of different width. Returns the samples of the wider one, and
    how many times as many tokens they would have without the probe's limit.

    `single`: seconds of one sample, or of one token where there are tokens. No generation is started that would take
    longer than there is time for, if many samples at once were no faster than one by one.
    """
    sampling = config.sampling
    longest, has_tokens = sampling.max_completion_length, "completion_ids" in policy.payload.names
    most = max(1, sampling.batch_size // len(prompts))
    widths = [min(width, most) for width in (sampling.num_generations, sampling.num_generations * WIDER)]
    if sampling.generation_kwargs:  # options of `generate`, such as beams, may depend on the number of completions
        widths = [sampling.num_generations]
    until = time.perf_counter() + trial.may(DRAW)

    def left() -> float:
        return max(0.0, until - time.perf_counter())

    def generate(prompts: list[Prompt], width: int, tokens: int | None) -> tuple[float, list[Sample]]:
        with limited(policy, tokens):
            return timed(lambda: generate_samples(policy, chunk_of(prompts, width, 0, sampling.batch_size)))

    def enter(seconds: list[float], samples: list[Sample], tokens: int | None, token: float) -> float:
        factor = longer = 1.0
        if tokens is not None and tokens < longest:  # what reached the limit counts with `longest` tokens
            lengths = np.array([len(sample.payload["completion_ids"]) for sample in samples], dtype=np.float64)
            factor = float(np.where(lengths >= tokens, longest, lengths).sum() / lengths.sum())
            longer = 1 + token * tokens * (factor - 1) / seconds[0] if factor > 1 else 1.0
        result.tokens = mean_tokens(as_table(samples, policy)) * factor
        line = LinearTime(0.0, seconds[0] / len(samples))
        if len(seconds) > 1:
            line = through(widths[0] * len(prompts), seconds[0], widths[1] * len(prompts), seconds[1])
        result.generate = line.times(longer)
        return factor

    brief = min(BRIEF, longest) if has_tokens else 1
    sample = single * brief
    if brief > 1 and sample < left() / 4:
        sample, _ = generate(prompts[:1], 1, brief)
    rows = int((left() / 2 if has_tokens else left()) / max(sample, 1e-9))
    if rows < 1:
        brief = min(brief, max(1, int(left() / max(single, 1e-9))))
    if rows < len(prompts):
        prompts = prompts[:1]
    if rows < len(prompts) * widths[0] and not sampling.generation_kwargs:
        narrow = max(1, rows // len(prompts))
        widths = [narrow * width // widths[0] for width in widths]
    widths = list(dict.fromkeys(widths))
    tokens, spent = None, 0.0
    if has_tokens:
        spent, samples = generate(prompts, widths[0], brief)
        factor = enter([spent], samples, brief, spent / brief)
        tokens = int(left() / (spent / brief) / (sum(widths) / widths[0]))
        if tokens < LEAST and len(widths) > 1:  # there is no time for both widths
            widths, tokens = widths[:1], int(left() / (spent / brief))
        tokens = min(longest, tokens)
        if tokens <= brief and len(widths) == 1:  # there is no time for more
            trial.cut_short += [f"answers were generated to {brief} of {longest} tokens"] * (factor > 1)
            return samples, factor
        tokens = max(tokens, min(LEAST, longest))
    seconds: list[float] = []
    for width in widths:
        if seconds and tokens is None and seconds[0] * width / widths[0] > left():
            were = "was" if len(samples) == 1 else "were"
            trial.cut_short.append(f"only {counted(len(samples), 'sample')} {were} generated")
            break
        wide, samples = generate(prompts, width, tokens)
        seconds.append(wide)
        # A token's time beside the prompt's: by the two generations of one width, or by one where noise denies it.
        token = (spent - seconds[0]) / (brief - tokens) if tokens is not None and brief != tokens else 0.0
        factor = enter(seconds, samples, tokens, token if token > 0 else seconds[0] / (tokens or 1))
    if tokens is not None and factor > 1:
        trial.cut_short.append(f"answers were generated to {tokens} of {longest} tokens")
    return samples, factor


def through(n1: int, t1: float, n2: int, t2: float) -> LinearTime:
    """The line through two measurements, kept from going below 0 by noise."""
    each = max(0.0, (t2 - t1) / (n2 - n1))
    return LinearTime(max(0.0, t1 - each * n1), each) if each else LinearTime(min(t1, t2), 0.0)


def time_rewards(
    rewards: Any, prompts: list[Prompt], samples: pa.Table, trial: ProbeRun
) -> tuple[LinearTime, list[Score]]:
    """The first call may load a model or start a process: that is the fixed part. Also returns the scores."""
    first, _ = timed(lambda: rewards.score_samples(prompts[:1], samples.slice(0, 1)))
    last = len(prompts) - 1
    each, _ = timed(lambda: rewards.score_samples(prompts[last:], samples.slice(last, 1)))
    number = min(len(prompts), max(LEAST, int(trial.may(SCORE) / max(each, 1e-6))))
    if number < len(prompts):
        trial.cut_short.append(f"{number} of {len(prompts)} samples were scored")
    every, scores = timed(lambda: rewards.score_samples(prompts[:number], samples.slice(0, number)))
    return LinearTime(first, every / number), scores


def sample_notes(config: RunConfig, samples: pa.Table, scores: list[Score], *, whole: bool) -> list[str]:
    """What samples and scores say against training on them, and the alarms that such a round would raise.

    `whole`: no sample was cut off by the probe, so that their ends are those of the run.
    """
    notes = []
    values = [score.value for score in scores if score.value is not None]
    if failed := sum(score.status in FAILED for score in scores):
        notes.append(f"{failed} of {len(scores)} tried samples could not be scored: `raftune reward check` tells more")
    if len(values) > 1 and min(values) == max(values):
        notes.append(f"all tried samples scored {values[0]:g}: there may be nothing to rank")
    if "finish" in samples.column_names and not whole:
        samples = samples.drop_columns(["finish"])
    elif "finish" in samples.column_names and config.training.mask_truncated_completions:
        finish = samples.column("finish").to_pylist()
        if set(finish) == {"length"}:
            notes.append(
                f"all {len(finish)} tried samples were cut off at max_completion_length, and "
                "training.mask_truncated_completions leaves such out: there may be nothing to learn from"
            )
    if config.num_rounds and config.guards.enabled:
        column = pa.array([score.value for score in scores], pa.float64())
        alarms = probe_alarms(samples.slice(0, len(scores)).append_column("score", column), config.guards)
        raised = "a round of such samples raises an alarm"
        notes += [one_line(f"{raised}: {alarm['title']}: {alarm['evidence']}") for alarm in alarms]
    return notes


def time_training(
    result: ProbeResult,
    runtime: Runtime,
    samples: pa.Table,
    prompts: pa.Table,
    work: Path,
    factor: float,
    longer: float,
    trial: ProbeRun,
) -> None:
    """Trains one pass over a batch of rows, and one over all rows or as many as there is time for; measures the memory
    of the first."""
    assert result.generate is not None and result.load is not None
    usual = runtime.policies.config
    batch = min(usual.training.per_device_train_batch_size, samples.num_rows)
    row = BACKWARD * result.generate.each / factor  # estimated seconds of a row
    rows = min(batch, max(1, int((trial.may(TRAIN) - result.load) / max(row, 1e-9))))
    if rows < batch:
        trial.cut_short.append(f"a step was taken with {rows} of {batch} rows")
    once = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": 1, "optimizer_state": "fresh"}
    once |= {"mask_truncated_completions": False}  # all samples of two prompts may be cut off, and cost as much
    once |= {"per_device_train_batch_size": rows, "save_steps": None}
    runtime.policies.config = usual.model_copy(update={"training": usual.training.model_copy(update=once)})

    def seconds(count: int, name: str) -> float:
        """Of one training on so many samples, the loading of the model included."""
        folder = work / name
        for part in ("work", "out"):
            (folder / part).mkdir(parents=True)
        config, used = runtime.config.training, samples.slice(0, count)
        objective = load_objective(config)
        verdicts = {
            "sample_id": used.column("sample_id"),
            "weight": np.full(count, float("kept" in objective.needs)),
            "score": np.zeros(count),
            "rank": np.ones(count, np.int32),
            "reason": [""] * count,
        }
        chosen = chosen_rows(objective, config.objective, used, pa.table(verdicts))
        write_table(with_prompts(chosen, prompts, 1), folder / "rows.parquet", {"raftune.round": "1"})
        policy = runtime.policies.fresh(runtime.run.folder(0, "model"))
        return timed(lambda: policy.train(folder / "rows.parquet", folder / "work", folder / "out"))[0]

    try:
        runtime.policies.release()
        memory = MemoryMeter()
        first = seconds(rows, "tune-first")
        result.training = memory.peak(samples, rows)
        step = max(first - result.load, 0.0)
        result.train = LinearTime(first - step, step / rows).times(longer)
        steps = min(samples.num_rows // rows, int((trial.may(TRAIN) - result.load) / max(step, 1e-6)))
        if steps >= 2:
            second = seconds(steps * rows, "tune-second")
            result.train = through(rows, first, steps * rows, second).times(longer)
    finally:
        runtime.policies.config = usual


def mean_tokens(samples: pa.Table) -> float:
    if "completion_ids" not in samples.column_names:
        return 0.0
    lengths = [len(ids) for ids in samples.column("completion_ids").to_pylist()]
    return sum(lengths) / len(lengths)


def seconds_by_stage(result: ProbeResult, planned: RoundAmounts, runtime: Runtime) -> dict[str, float]:
    """Seconds of the whole run by kind of work, in this process; without the kinds that were not measured."""
    config, rounds = runtime.config, planned.rounds
    width = config.sampling.batch_size
    judged = (rounds + 1) * planned.judged
    batches = rounds * math.ceil(planned.drawn / width) + (rounds + 1) * math.ceil(planned.judged / width)
    kl = config.evaluation.kl and runtime.has_log_probs()
    compared = 2 * judged * kl + 2 * rounds * planned.competing * (config.selection.beta > 0)
    batch = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    seconds: dict[str, float] = {}
    if result.generate is not None:
        seconds["generating"] = (result.load or 0.0) * (2 * rounds + 1) + result.generate.of(planned.samples, batches)
    if result.score is not None:
        seconds["scoring"] = result.score.of(rounds * planned.competing + judged)
        seconds["scoring"] += result.judge.of(judged) if result.judge is not None else 0.0
    if result.logp is not None:
        seconds["log-probabilities"] = result.logp.of(compared, 0)
    if result.train is not None:
        seconds["training"] = result.train.of(rounds * planned.steps * batch, rounds)
    return seconds
