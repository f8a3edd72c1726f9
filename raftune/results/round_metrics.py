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


class SampleStats:
    """What a round generated, summed up chunk by chunk: memory grows with the number of samples, not with their
    texts. `tokens` counts those of the completions; with an encoder those of the prompts too.
    """

    def __init__(self, run: RunFolder, round_: int, encoder: Any = None) -> None:
        self._folders = {name: run.folder(round_, name) for name in ("plan", "generate", "score", "logp", "logp-start")}
        self._values: defaultdict[str, list[FloatArray]] = defaultdict(list)
        self._flat: list[bool] = []
        self.tokens = 0
        for chunk in chunk_numbers(self._folders["score"]):
            self._add_scores(chunk)
            self._add_lengths(chunk, encoder)

    def metrics(self) -> dict[str, float]:
        """`reward`, `reward_std`, `rewards/NAME/mean`, … of the policy's own samples; what has no value is left out."""
        result: dict[str, float] = logged_metrics(self._folders["score"])
        names = {"score": ("reward", "reward_std"), "length": ("completions/mean_length", "")}
        names |= {"clipped": ("completions/clipped_ratio", ""), "kl": ("kl", "")}
        for name, chunks in self._values.items():
            mean, deviation = names.get(name, (f"{name}/mean", f"{name}/std"))
            values = np.concatenate(chunks)
            values = values[np.isfinite(values)]
            if len(values):
                result[mean] = float(values.mean())
                if deviation:
                    result[deviation] = float(values.std())
        if self._flat:
            result["frac_reward_zero_std"] = float(np.mean(self._flat))
        if lengths := self._values.get("length"):
            result["completions/min_length"] = float(np.concatenate(lengths).min())
            result["completions/max_length"] = float(np.concatenate(lengths).max())
        return result

    def _add(self, name: str, values: Any) -> None:
        self._values[name].append(np.asarray(values, dtype=np.float64))

    def _add_scores(self, chunk: int) -> None:
        """The scores; and the KL to the start, nats an answer, which is known while generating with beta > 0."""
        scores = read_table(self._folders["score"] / chunk_file(chunk))
        table = own(scores)
        usable = pc.if_else(pc.equal(table.column("status"), "ok"), table.column("score"), None)
        self._add("score", usable.to_numpy(zero_copy_only=False))
        for name in table.column_names:
            if name.startswith("rewards/"):
                self._add(name, table.column(name).to_numpy(zero_copy_only=False))
        prompts = pa.table({"prompt_id": table.column("prompt_id"), "score": usable})
        ends = prompts.group_by("prompt_id").aggregate([("score", "min"), ("score", "max")])
        same = pc.equal(ends.column("score_min"), ends.column("score_max")).drop_null()
        self._flat += same.to_pylist()
        paths = [self._folders[name] / chunk_file(chunk) for name in ("logp", "logp-start")]
        if paths[0].is_file():
            now, start = (read_table(path, ["log_prob"]).column("log_prob").to_numpy() for path in paths)
            self._add("kl", (now - start)[np.array(scores.column("source").to_pylist()) == "policy"])

    def _add_lengths(self, chunk: int, encoder: Any) -> None:
        path = self._folders["generate"] / chunk_file(chunk)
        if "completion_ids" not in column_names(path):
            return
        table = own(read_table(path, ["source", "prompt_id", "completion_ids", "finish"]))
        lengths = pc.list_value_length(table.column("completion_ids")).to_numpy(zero_copy_only=False)
        self._add("length", lengths)
        self._add("clipped", pc.equal(table.column("finish"), "length").to_numpy(zero_copy_only=False))
        self.tokens += int(lengths.sum())
        if encoder is not None:
            prompts = read_chunk(self._folders["plan"], chunk).prompts
            times = Counter(table.column("prompt_id").to_pylist())
            encoded = encoder.encode(prompts, for_drawing=True)
            self.tokens += sum(times[prompt.id] * len(ids) for prompt, ids in zip(prompts, encoded, strict=True))


def own(table: pa.Table) -> pa.Table:
    """The policy's own samples: without a teacher's, and without columns of the data."""
    return table.filter(pc.equal(table.column("source"), "policy"))


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
