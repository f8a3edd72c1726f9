"""A round's metrics under TRL's names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raftune.arrays import FloatArray
from raftune.records import EXTRA, extras_of
from raftune.results.samples import answer_text
from raftune.results.summary import ends_of
from raftune.stages.plan import read_chunk
from raftune.stages.score import logged_metrics
from raftune.store.committed import check_file, read_json
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_table
from raftune.store.run import RunFolder


def sample_stats(run: RunFolder, round_: int, encoder: Any = None) -> tuple[dict[str, float], int]:
    """`reward`, `reward_std`, `rewards/NAME/mean`, … of what the policy generated in a round, and its tokens.

    What has no value is left out. Tokens are those of the completions; with an encoder those of the prompts too. Read
    chunk by chunk: memory grows with the number of samples, not with their texts.
    """
    folders = {name: run.folder(round_, name) for name in ("plan", "generate", "score", "logp", "logp-start")}
    values: defaultdict[str, list[FloatArray]] = defaultdict(list)
    flat: list[bool] = []
    tokens = 0

    def add(name: str, column: pa.ChunkedArray) -> None:
        values[name].append(np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64))

    for chunk in chunk_numbers(folders["score"]):
        scores = read_table(folders["score"] / chunk_file(chunk))
        from_policy = pc.equal(scores.column("source"), "policy")
        table = scores.filter(from_policy)
        score = pc.if_else(pc.equal(table.column("status"), "ok"), table.column("score"), None)
        add("score", score)
        for name in table.column_names:
            if name.startswith("rewards/"):
                add(name, table.column(name))
        prompts = pa.table({"prompt_id": table.column("prompt_id"), "score": score}).group_by("prompt_id")
        ends = prompts.aggregate([("score", "min"), ("score", "max")])
        flat += pc.equal(ends.column("score_min"), ends.column("score_max")).drop_null().to_pylist()
        paths = [folders[name] / chunk_file(chunk) for name in ("logp", "logp-start")]
        if paths[0].is_file():  # with beta > 0: the KL to the start, nats an answer
            now, start = (read_table(path, ["log_prob"]).column("log_prob") for path in paths)
            add("kl", pc.subtract(now, start).filter(from_policy))

        path = folders["generate"] / chunk_file(chunk)
        if "completion_ids" in column_names(path):
            table = read_table(path, ["source", "prompt_id", "completion_ids", "finish"])
            table = table.filter(pc.equal(table.column("source"), "policy"))
            lengths = pc.list_value_length(table.column("completion_ids"))
            add("length", lengths)
            add("clipped", pc.equal(table.column("finish"), "length"))
            tokens += pc.sum(lengths).as_py() or 0
            if encoder is not None:
                planned = read_chunk(folders["plan"], chunk).prompts
                times = Counter(table.column("prompt_id").to_pylist())
                encoded = encoder.encode(planned, for_drawing=True)
                tokens += sum(times[prompt.id] * len(ids) for prompt, ids in zip(planned, encoded, strict=True))

    result: dict[str, float] = logged_metrics(folders["score"])
    names = {"score": ("reward", "reward_std"), "length": ("completions/mean_length", "")}
    names |= {"clipped": ("completions/clipped_ratio", ""), "kl": ("kl", "")}
    for name, chunks in values.items():
        mean, deviation = names.get(name, (f"{name}/mean", f"{name}/std"))
        finite = np.concatenate(chunks)
        finite = finite[np.isfinite(finite)]
        if len(finite):
            result[mean] = float(finite.mean())
            result |= {deviation: float(finite.std())} if deviation else {}
            if name == "length":
                result |= {"completions/min_length": float(finite.min()), "completions/max_length": float(finite.max())}
    if flat:
        result["frac_reward_zero_std"] = float(np.mean(flat))
    mismatch = mismatch_of(run, round_)
    for name in ("mean", "p99", "max") if mismatch else ():
        result[f"sampling/sampling_logp_difference/{name}"] = float(mismatch[name])
    return result, tokens


def held_out(metrics: Mapping[str, Any], prefix: str = "eval", *, ends: bool = False) -> dict[str, float]:
    """The committed metrics of the held-out prompts, flat: `eval_reward`, `eval_rewards/NAME/mean`, ….

    With `ends`, those of the 95 % interval stand beside each mean, as `eval_reward_low` and `eval_reward_high`.
    """

    def flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping) and "mean" in value:
            yield name, float(value["mean"])
            if ends and (interval := ends_of(value)):
                yield from ((f"{name}_low", float(interval[0])), (f"{name}_high", float(interval[1])))
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                yield from flat(f"{name}/{key}", inner)
        elif isinstance(value, (int, float)):
            yield name, float(value)

    return {key: number for name, value in metrics.items() for key, number in flat(f"{prefix}_{name}", value)}


def mismatch_of(run: RunFolder, round_: int) -> dict[str, Any]:
    """How far recorded log-probabilities of a round are from the trainer's, see SupportsMismatch; empty without any."""
    path = run.folder(round_, "model") / "training.json"
    return dict(read_json(path)["details"].get("mismatch", {})) if path.is_file() else {}


def losses(run: RunFolder, round_: int) -> list[float]:
    """The mean loss of each optimizer step of the round."""
    report = read_json(run.folder(round_, "model") / "training.json")
    return [float(loss) for loss in report["losses"]]


def kept(run: RunFolder, round_: int, count: int | None) -> list[tuple[Any, str, float | None, dict[str, Any]]]:
    """The first `count` of what the round learned from: prompt, completion, score (None where it is from elsewhere),
    and what rewards gave to `log_extra` of it."""
    file = pq.ParquetFile(check_file(run.folder(round_, "rows") / "rows.parquet"))
    rows: list[dict[str, Any]] = []
    for batch in file.iter_batches(batch_size=count or 1000, columns=["sample_id", "prompt", "completion"]):
        rows += batch.to_pylist()
        if count is not None and len(rows) >= count:
            break
    rows = rows[:count]
    ids = pa.array([row["sample_id"] for row in rows], pa.string())
    verdicts = read_table(run.folder(round_, "select") / "verdicts.parquet", ["sample_id", "score"])
    scored = verdicts.filter(pc.is_in(verdicts.column("sample_id"), ids)).to_pydict()
    scores = dict(zip(scored["sample_id"], scored["score"], strict=True))
    logged: dict[str, dict[str, Any]] = {}
    for chunk in chunk_numbers(run.folder(round_, "score")):
        path = run.folder(round_, "score") / chunk_file(chunk)
        if extras := [name for name in column_names(path) if name.startswith(EXTRA)]:
            table = read_table(path, ["sample_id", *extras])
            table = table.filter(pc.is_in(table.column("sample_id"), ids))
            logged |= {row["sample_id"]: extras_of(row) for row in table.to_pylist()}
    return [
        (row["prompt"], answer_text(row["completion"]), scores.get(row["sample_id"]), logged.get(row["sample_id"], {}))
        for row in rows
    ]
