"""Two prompts, drawn, scored and tuned on: what each stage costs for a sample, and before the first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.build import Assembly
from raftune.errors import RewardError
from raftune.planning.amounts import Amounts
from raftune.protocols import Likelihood, Policy, Unit
from raftune.records import Prompt, Sample, Score, Status, derive_seed
from raftune.stages.draw import as_table, drawn
from raftune.stages.gather import kept_rows
from raftune.stages.plan import prompts_from
from raftune.store.parquet import read_table, write_table

FAILED = (Status.INVALID, Status.ERROR, Status.TIMEOUT)
ASKED = 2
WIDER = 4  # the second draw is so many times as wide, which tells what a batch costs from what a sample does


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line: `fixed` before the first item, and `each` for every one."""

    fixed: float = 0.0
    each: float = 0.0

    def of(self, items: float, starts: float = 1.0) -> float:
        return self.fixed * starts + self.each * items


@dataclass(frozen=True)
class Probe:
    """What was measured: seconds by stage, tokens or bytes of a sample on average, and what a user should know."""

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


def probe(assembly: Assembly, data: Path, work: Path, widths: Sequence[int] = ()) -> Probe:
    """Runs each stage's work on two prompts, in `work`; raises what the run itself would. `widths`: how many samples of
    each are drawn, first and then; without any, K and then four times as many."""
    began = time.perf_counter()
    config, folder = assembly.config, assembly.run.folder(0, "model")
    table = read_table(data / ("train.parquet" if config.num_rounds else "held_out.parquet")).slice(0, ASKED)
    prompts = prompts_from(table)
    policy = assembly.policies.at(folder)
    first = config.sampling.num_generations if config.sampling.generation_kwargs else 1
    load, _ = timed(lambda: drawn(policy, asking(prompts, first, config.seed, config.sampling.batch_size)))
    draw, found = time_draw(policy, prompts, assembly, widths)
    samples = as_table(found, policy)
    asked = {prompt.id: prompt for prompt in prompts}
    owners = [asked[sample.prompt_id] for sample in found]
    score, scores = time_panel(assembly.panel(), owners, samples)
    refuse_failures(scores, config.rewards.max_failure_fraction)
    judge = time_panel(assembly.judge(), owners, samples)[0] if config.evaluation.reward_funcs else Line()
    logp = time_logp(policy, owners, samples, config.sampling.batch_size)
    tune = time_tune(assembly, samples, table, work)
    said = (*policy.notes(), *assembly.panel().notes())
    notes = (*said, *doubts(scores), *cut_off(samples, config.tuning.mask_truncated_completions))
    return Probe(
        load,
        draw,
        score,
        judge,
        logp,
        tune,
        mean_tokens(samples),
        mean_size(samples),
        notes,
        time.perf_counter() - began,
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def asking(prompts: list[Prompt], number: int, seed: int, batch_size: int) -> Unit:
    """A unit of a training round: what is tuned on is drawn."""
    seeds = tuple(tuple(derive_seed("probe", seed, prompt.id, k) for k in range(number)) for prompt in prompts)
    return Unit(0, "0001", "probe", tuple(prompts), seeds, batch_size)


def time_draw(
    policy: Policy, prompts: list[Prompt], assembly: Assembly, chosen: Sequence[int]
) -> tuple[Line, list[Sample]]:
    """The cost of a batch and of a sample, from two draws of different width; and the samples of the wider one."""
    sampling = assembly.config.sampling
    widths = chosen or [sampling.num_generations, sampling.num_generations * WIDER]
    most = max(1, sampling.batch_size // len(prompts))
    widths = [min(width, most) for width in widths]
    if sampling.generation_kwargs:  # options of `generate`, such as beams, may hang on the number of answers
        widths = [sampling.num_generations]
    seconds: list[float] = []
    found: list[Sample] = []
    for width in dict.fromkeys(widths):
        spent, found = timed(lambda w=width: drawn(policy, asking(prompts, w, 0, sampling.batch_size)))  # type: ignore[misc]
        seconds.append(spent)
    if len(seconds) == 1:
        return Line(0.0, seconds[0] / len(found)), found
    return through(widths[0] * len(prompts), seconds[0], widths[1] * len(prompts), seconds[1]), found


def through(n1: int, t1: float, n2: int, t2: float) -> Line:
    """The line through two measurements, kept from going below 0 by noise."""
    each = max(0.0, (t2 - t1) / (n2 - n1))
    return Line(max(0.0, t1 - each * n1), each) if each else Line(min(t1, t2), 0.0)


def time_panel(panel: Any, prompts: list[Prompt], samples: pa.Table) -> tuple[Line, list[Score]]:
    """The first call may load a model or start a process: that is the fixed part. Beside it, what was scored."""
    first, _ = timed(lambda: panel.score_samples(prompts[:1], samples.slice(0, 1)))
    every, scores = timed(lambda: panel.score_samples(prompts, samples))
    return Line(first, every / len(prompts)), scores


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


def time_logp(policy: Policy, prompts: list[Prompt], samples: pa.Table, batch_size: int) -> Line:
    if not isinstance(policy, Likelihood):
        return Line()
    spent, _ = timed(lambda: policy.log_probs(prompts, samples, batch_size))
    return Line(0.0, spent / len(prompts))


def time_tune(assembly: Assembly, samples: pa.Table, prompts: pa.Table, work: Path) -> Line:
    """Two fits of one pass, over a batch of rows and over as many as there are."""
    batch = min(assembly.config.tuning.per_device_train_batch_size, samples.num_rows)
    sizes = sorted({batch, samples.num_rows})
    once = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": 1, "optimizer_state": "fresh"}
    once |= {"mask_truncated_completions": False}  # two prompts may give none that ends, and cost as much to tune on
    usual = assembly.policies.config
    tuning = usual.tuning.model_copy(update=once)
    assembly.policies.config = usual.model_copy(update={"tuning": tuning})
    try:
        measured = [(size, fit(assembly, samples.slice(0, size), prompts, work / f"tune-{size}")) for size in sizes]
    finally:
        assembly.policies.config = usual
    if len(measured) == 1:
        return Line(0.0, measured[0][1] / measured[0][0])
    return through(*measured[0], *measured[1])


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
