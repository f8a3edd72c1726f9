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
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.config.run import RunConfig
from raftune.errors import RewardError
from raftune.evaluation.alarms import probe_alarms
from raftune.policies.footprint import MeasuredPeak, RoundAmounts
from raftune.protocols import Chunk, SupportsBackends, SupportsLogProbs
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
    cut_short: list[str] = field(default_factory=list)
    missing: tuple[str, ...] = ()
    generation: str = ""  # how it generates, in words, where there are several ways
    drawing: MeasuredPeak | None = None
    training: MeasuredPeak | None = None
    comparing: MeasuredPeak | None = None  # log-probabilities


class TimeUp(KeyboardInterrupt):
    """The probe's time is over. A KeyboardInterrupt, so that user code does not catch it."""


@dataclass
class ProbeRun:
    """The clock of a plan: `seconds` for reading the model and for the probe together (infinite without a probe)."""

    seconds: float
    tell: Emit
    began: float = field(default_factory=time.perf_counter)
    shared: float = 0.0  # seconds that remained when the probe began, of which each part has its share

    def remaining(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def share(self, part: float) -> float:
        """Seconds that a part of the probe may take."""
        return max(0.0, min(self.shared * part, self.remaining()))

    def check(self) -> None:
        if self.remaining() <= 0:
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

        SIGALRM interrupts between two Python operations on the main thread, and again every second, as foreign code may
        swallow it; an alarm that was set before is restored. Where there is no SIGALRM (Windows, another thread), the
        call goes on to its next `check`.
        """
        if self.remaining() <= 0:
            return True
        fired: list[bool] = []

        def ring(*_: object) -> None:
            fired.append(True)
            raise TimeUp

        on_main_thread = threading.current_thread() is threading.main_thread()
        timed = hasattr(signal, "setitimer") and on_main_thread and math.isfinite(self.seconds)
        try:
            if timed:
                began, handler = time.monotonic(), signal.signal(signal.SIGALRM, ring)
                earlier, interval = signal.setitimer(signal.ITIMER_REAL, self.remaining(), 1.0)
            try:
                call()
            finally:
                if timed:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    signal.signal(signal.SIGALRM, handler)
                    if earlier:
                        rest = max(0.001, earlier - (time.monotonic() - began))
                        signal.setitimer(signal.ITIMER_REAL, rest, interval)
        except BaseException as error:
            if (fired or isinstance(error, TimeUp)) and interrupting(error) is not None:
                return True
            raise
        return bool(fired)


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
    trial.shared = trial.remaining()
    if trial.ended(lambda: Measurements(result, runtime, data, work, trial).run()):
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
    result.seconds = trial.seconds - trial.remaining()
    return result


class Measurements:
    """One method for each stage. Each measurement enters `result` at once, as `run` may be interrupted at any time."""

    def __init__(self, result: ProbeResult, runtime: Runtime, data: Path, work: Path, trial: ProbeRun) -> None:
        self.result, self.runtime, self.config, self.work, self.trial = result, runtime, runtime.config, work, trial
        file = "train" if self.config.num_rounds else "held_out"
        self.table = read_table(data / f"{file}.parquet").slice(0, PROMPTS)
        self.prompts = prompts_from(self.table)
        self.factor = self.longer = (
            1.0  # tokens of a completion, and of a whole row, in the run over those in the probe
        )

    def run(self) -> None:
        config, result, trial = self.config, self.result, self.trial
        trial.tell("probe: loading the model, first generation")
        self.policy = policy = self.runtime.policies.at(self.runtime.run.folder(0, "model"))
        trying = 0.0
        if isinstance(policy, SupportsBackends):
            trying, backend = timed(lambda: policy.choose_backend(self.prompts))
            result.generation = generation_words(backend) if backend else ""
        width = config.sampling.num_generations if config.sampling.generation_kwargs else 1
        cold, _ = self.generate(self.prompts[:1], width, 1)
        token, _ = self.generate(self.prompts[:1], width, 1)
        result.load = trying + max(0.0, cold - token)
        trial.check()

        trial.tell("probe: generating")
        memory = MemoryMeter()
        generated = self.time_generation(token / width)
        self.samples = samples = as_table(generated, policy)
        result.drawing = memory.peak(samples, samples.num_rows)
        if samples.schema.field("completion").type == pa.binary():
            sizes = [len(image) for image in samples.column("completion").to_pylist() if image is not None]
            result.size = sum(sizes) / len(sizes) if sizes else None
        result.notes = policy.notes()
        trial.check()

        trial.tell("probe: scoring")
        by_id = {prompt.id: prompt for prompt in self.prompts}
        self.owners = owners = [by_id[sample.prompt_id] for sample in generated]
        result.score, scores = self.time_rewards(self.runtime.rewards())
        failed = [score for score in scores if score.status in FAILED]
        if len(failed) > config.rewards.max_failure_fraction * len(scores):
            example = next(f"{name}: {part.detail}" for name, part in failed[0].parts.items() if part.status in FAILED)
            raise RewardError(
                f"rewards: {len(failed)} of {len(scores)} tried samples could not be scored; "
                f"rewards.max_failure_fraction allows {config.rewards.max_failure_fraction:g}. For example {example}. "
                "`raftune reward check` tells more."
            )
        result.notes += (
            *self.runtime.rewards().notes(),
            *sample_notes(config, samples, scores, complete=self.factor == 1),
        )
        trial.check()
        judged = bool(config.evaluation.reward_funcs)
        result.judge = self.time_rewards(self.runtime.held_out_rewards())[0] if judged else LinearTime()
        trial.check()

        if self.factor != 1:
            lengths = policy.encoder.encode(self.prompts, for_drawing=True)  # type: ignore[attr-defined]
            prompt, tokens = sum(map(len, lengths)) / len(lengths), mean_tokens(samples)
            self.longer = (prompt + tokens * self.factor) / (prompt + tokens)
        seconds = 0.0
        if isinstance(policy, SupportsLogProbs):
            batch, few = config.sampling.batch_size, min(LEAST, len(owners))
            memory = MemoryMeter()
            seconds = timed(lambda: policy.log_probs(owners[:few], samples.slice(0, few), batch))[0] / few
            if seconds * len(owners) <= trial.share(LOGP):
                seconds = timed(lambda: policy.log_probs(owners, samples, batch))[0] / len(owners)
            result.comparing = memory.peak(samples, min(batch, len(owners)))
        result.logp = LinearTime(0.0, seconds * self.longer)
        trial.check()
        if config.num_rounds:
            trial.tell("probe: training")
            self.time_training()
        else:
            result.train = LinearTime()

    def generate(self, prompts: list[Prompt], width: int, tokens: int) -> tuple[float, list[Sample]]:
        """Seconds and samples of a generation; a policy that counts tokens generates so many at most."""
        policy, config = self.policy, self.config
        seeds = tuple(tuple(derive_seed("probe", config.seed, p.id, k) for k in range(width)) for p in prompts)
        chunk = Chunk(0, "0001", "probe", tuple(prompts), seeds, config.sampling.batch_size)
        usual: Any = getattr(policy, "config", None)
        limited = "completion_ids" in policy.payload.names and hasattr(usual, "sampling")
        try:
            if limited:
                tokens = min(tokens, usual.sampling.max_completion_length)
                sampling = usual.sampling.model_copy(update={"max_completion_length": tokens})
                policy.config = usual.model_copy(update={"sampling": sampling})  # type: ignore[attr-defined]
            return timed(lambda: generate_samples(policy, chunk))
        finally:
            if limited:
                policy.config = usual  # type: ignore[attr-defined]

    def time_generation(self, token: float) -> list[Sample]:
        """Measures a batch and a sample by two generations of different width; returns the samples of the wider one.

        `token`: seconds of one sample of one token; of one sample where there are no tokens. A generation is sized by
        what the one before took, as if many samples at once were no faster than one by one.
        """
        sampling, prompts = self.config.sampling, self.prompts
        has_tokens = "completion_ids" in self.policy.payload.names
        longest = sampling.max_completion_length if has_tokens else 1
        most = max(1, sampling.batch_size // len(prompts))
        widths = [min(width, most) for width in (sampling.num_generations, sampling.num_generations * WIDER)]
        if sampling.generation_kwargs:  # options of `generate`, such as beams, may depend on the number of completions
            widths = [sampling.num_generations]
        until = time.perf_counter() + self.trial.share(DRAW)

        def remaining() -> float:
            return max(0.0, until - time.perf_counter())

        def record(tokens: int, seconds: list[float], samples: list[Sample], token: float) -> None:
            self.factor = longer = 1.0
            if tokens < longest:  # what reached the limit counts with `longest` tokens
                lengths = np.array([len(sample.payload["completion_ids"]) for sample in samples], dtype=np.float64)
                self.factor = float(np.where(lengths >= tokens, longest, lengths).sum() / lengths.sum())
                longer = 1 + token * tokens * (self.factor - 1) / seconds[0]
            self.result.tokens = mean_tokens(as_table(samples, self.policy)) * self.factor
            line = LinearTime(0.0, seconds[0] / len(samples))
            if len(seconds) > 1:
                line = through(widths[0] * len(prompts), seconds[0], widths[1] * len(prompts), seconds[1])
            self.result.generate = line.times(longer)

        # The number of rows, by the time of one row; half of the time is for the generation with more tokens.
        brief = min(BRIEF, longest)
        if brief > 1 and token * brief < remaining() / 4:
            token = self.generate(prompts[:1], 1, brief)[0] / brief
        rows = int(remaining() / max(token * brief, 1e-9) / (2 if has_tokens else 1))
        if rows < 1:
            brief = max(1, min(brief, int(remaining() / max(token, 1e-9))))
        if rows < len(prompts):
            prompts = prompts[:1]
        if rows < len(prompts) * widths[0] and not sampling.generation_kwargs:
            narrow = max(1, rows // len(prompts))
            widths = [narrow * width // widths[0] for width in widths]
        widths = list(dict.fromkeys(widths))

        # The number of tokens, by the time of a few.
        tokens, first = 1, 0.0
        if has_tokens:
            first, samples = self.generate(prompts, widths[0], brief)
            record(brief, [first], samples, first / brief)
            affordable = int(remaining() / (first / brief))
            if affordable * widths[0] < LEAST * sum(widths):  # there is no time for both widths
                widths = widths[:1]
            tokens = min(longest, affordable * widths[0] // sum(widths))
            if tokens <= brief and len(widths) == 1:  # there is no time for more
                self.result.cut_short += [f"completions were generated to {brief} of {longest} tokens"] * (
                    self.factor > 1
                )
                return samples
            tokens = max(tokens, min(LEAST, longest))

        seconds: list[float] = []
        for width in widths:
            if seconds and not has_tokens and seconds[0] * width / widths[0] > remaining():
                were = "was" if len(samples) == 1 else "were"
                self.result.cut_short.append(f"only {counted(len(samples), 'sample')} {were} generated")
                break
            spent, samples = self.generate(prompts, width, tokens)
            seconds.append(spent)
            # A token's time beside the prompt's: by the two generations of one width, or by one where noise denies it.
            token = (first - seconds[0]) / (brief - tokens) if brief != tokens else 0.0
            record(tokens, seconds, samples, token if token > 0 else seconds[0] / tokens)
        if self.factor > 1:
            self.result.cut_short.append(f"completions were generated to {tokens} of {longest} tokens")
        return samples

    def time_rewards(self, rewards: Any) -> tuple[LinearTime, list[Score]]:
        """The first call may load a model or start a process: that is the fixed part. Also returns the scores."""
        prompts, samples = self.owners, self.samples
        first, _ = timed(lambda: rewards.score_samples(prompts[:1], samples.slice(0, 1)))
        last = len(prompts) - 1
        each, _ = timed(lambda: rewards.score_samples(prompts[last:], samples.slice(last, 1)))
        number = min(len(prompts), max(LEAST, int(self.trial.share(SCORE) / max(each, 1e-6))))
        if number < len(prompts):
            self.result.cut_short.append(f"{number} of {len(prompts)} samples were scored")
        total, scores = timed(lambda: rewards.score_samples(prompts[:number], samples.slice(0, number)))
        return LinearTime(first, total / number), scores

    def time_training(self) -> None:
        """Trains one pass over a batch of rows, and one over all rows or as many as there is time for."""
        result, runtime, trial, samples = self.result, self.runtime, self.trial, self.samples
        assert result.generate is not None and result.load is not None
        usual = runtime.policies.config
        batch = min(usual.training.per_device_train_batch_size, samples.num_rows)
        row = BACKWARD * result.generate.each / self.factor  # estimated seconds of a row
        rows = min(batch, max(1, int((trial.share(TRAIN) - result.load) / max(row, 1e-9))))
        if rows < batch:
            result.cut_short.append(f"a step was taken with {rows} of {batch} rows")
        once = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": 1, "optimizer_state": "fresh"}
        once |= {"mask_truncated_completions": False}  # all samples of two prompts may be cut off, and cost as much
        once |= {"per_device_train_batch_size": rows, "save_steps": None}
        runtime.policies.config = usual.model_copy(update={"training": usual.training.model_copy(update=once)})

        def seconds(count: int, name: str) -> float:
            """Of one training on so many samples, the loading of the model included."""
            folder = self.work / name
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
            write_table(with_prompts(chosen, self.table, 1), folder / "rows.parquet", {"raftune.round": "1"})
            policy = runtime.policies.fresh(runtime.run.folder(0, "model"))
            return timed(lambda: policy.train(folder / "rows.parquet", folder / "work", folder / "out"))[0]

        try:
            runtime.policies.release()
            memory = MemoryMeter()
            first = seconds(rows, "tune-first")
            result.training = memory.peak(samples, rows)
            step = max(first - result.load, 0.0)
            result.train = LinearTime(first - step, step / rows).times(self.longer)
            steps = min(samples.num_rows // rows, int((trial.share(TRAIN) - result.load) / max(step, 1e-6)))
            if steps >= 2:
                second = seconds(steps * rows, "tune-second")
                result.train = through(rows, first, steps * rows, second).times(self.longer)
        finally:
            runtime.policies.config = usual


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def through(n1: int, t1: float, n2: int, t2: float) -> LinearTime:
    """The line through two measurements, kept from going below 0 by noise."""
    each = max(0.0, (t2 - t1) / (n2 - n1))
    return LinearTime(max(0.0, t1 - each * n1), each) if each else LinearTime(min(t1, t2), 0.0)


def sample_notes(config: RunConfig, samples: pa.Table, scores: list[Score], *, complete: bool) -> list[str]:
    """What samples and scores say against training on them, and the alarms that such a round would raise.

    `complete`: no sample was cut off by the probe, so that their ends are those of the run.
    """
    notes = []
    values = [score.value for score in scores if score.value is not None]
    if failed := sum(score.status in FAILED for score in scores):
        notes.append(f"{failed} of {len(scores)} tried samples could not be scored: `raftune reward check` tells more")
    if len(values) > 1 and min(values) == max(values):
        notes.append(f"all tried samples scored {values[0]:g}: there may be nothing to rank")
    if "finish" in samples.column_names and not complete:
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


def mean_tokens(samples: pa.Table) -> float:
    if "completion_ids" not in samples.column_names:
        return 0.0
    lengths = [len(ids) for ids in samples.column("completion_ids").to_pylist()]
    return sum(lengths) / len(lengths)


def seconds_by_stage(
    result: ProbeResult, planned: RoundAmounts, runtime: Runtime, times: float = 1.0, training_times: float = 1.0
) -> dict[str, float]:
    """Seconds of the whole run by kind of work; without the kinds that were not measured. `times`: how many times as
    fast as this process all workers together are, where there are chunks; `training_times`: all that train."""
    config, rounds = runtime.config, planned.rounds
    width = config.sampling.batch_size
    judged = (rounds + 1) * planned.judged
    batches = rounds * math.ceil(planned.generated / width) + (rounds + 1) * math.ceil(planned.judged / width)
    kl = config.evaluation.kl and runtime.has_log_probs()
    compared = 2 * judged * kl + 2 * rounds * planned.competing * (config.selection.beta > 0)
    batch = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    seconds: dict[str, float] = {}
    if result.generate is not None:
        generating = result.generate.of(planned.samples, batches)
        seconds["generating"] = (result.load or 0.0) * (2 * rounds + 1) + generating / times
    if result.score is not None:
        seconds["scoring"] = result.score.of(rounds * planned.competing + judged)
        seconds["scoring"] += result.judge.of(judged) if result.judge is not None else 0.0
        seconds["scoring"] /= times
    if result.logp is not None:
        seconds["log-probabilities"] = result.logp.of(compared, 0) / times
    if result.train is not None:
        seconds["training"] = result.train.of(rounds * planned.steps * batch / training_times, rounds)
    return seconds
