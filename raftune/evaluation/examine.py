"""Compares what a round generated with what it kept, and raises the alarms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray, IntArray
from raftune.config.guards import GuardsConfig
from raftune.evaluation import alarms, picture_alarms
from raftune.evaluation.alarms import Alarm, column, texts_of
from raftune.evaluation.bootstrap import mean_by_prompt
from raftune.evaluation.columns import prompt_numbers
from raftune.evaluation.diversity import distinct, msttr, numbered, similarities, unique
from raftune.protocols import MonitorInput


class RoundMonitor:
    """Computes the measures and alarms of a round, with the configured thresholds."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config

    def similarities(self, texts: Sequence[str], groups: IntArray) -> FloatArray:
        return similarities(texts, groups)

    def measures(self, evidence: MonitorInput) -> dict[str, dict[str, Any]]:
        """The measures of the policy's own samples, and of what was kept, each kept sample counting by its weight.

        Words are counted in sets of one size, so that they can be compared: those that were kept, and of what was
        generated the control. What cannot be measured is left out.
        """
        samples = evidence.samples
        drawn, kept = samples.filter(pc.equal(samples.column("source"), "policy")), kept_of(samples)
        found = {
            "generated": numbers(drawn, np.ones(drawn.num_rows)),
            "selected": numbers(kept, column(kept, "weight")),
        }
        if "text" in samples.column_names:
            control = samples.filter(samples.column("control"))
            found["generated"] |= mean_of(
                "similarity", mean_by_prompt(prompt_numbers(drawn), column(drawn, "similarity"))
            )
            found["selected"] |= mean_of("similarity", similarities(texts_of(kept), prompt_numbers(kept)))
            found["generated"] |= words(control)
            found["selected"] |= words(kept)
        if "thumbnail" in samples.column_names:
            looks = picture_alarms.measures(drawn, samples.filter(samples.column("control")), kept)
            found["generated"] |= looks[0]
            found["selected"] |= looks[1]
        return found

    def alarms(self, evidence: MonitorInput, sets: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What a person should look at, as plain data."""
        return [alarm.as_json(evidence.round) for alarm in self.raised(evidence, sets) if alarm is not None]

    def raised(self, evidence: MonitorInput, sets: Mapping[str, Mapping[str, Any]]) -> Iterator[Alarm | None]:
        """The outcome of every rule that what is known suffices for."""
        limits, held_out, kept = self.config, evidence.held_out, kept_of(evidence.samples)
        if held_out is not None and any(table is not None for table in evidence.earlier):
            yield alarms.held_out_falls(held_out, evidence.earlier, evidence.judge, limits.false_alarms)
        first = evidence.first or sets["generated"]
        if "text" in evidence.samples.column_names:
            yield alarms.diversity_drops(sets, first, kept, limits.diversity_drop)
            yield alarms.length_drifts(sets, first, kept, limits.length_factor)
            yield alarms.near_duplicates(sets, first, kept, limits.duplicate_rise)
        if "thumbnail" in evidence.samples.column_names:
            yield from self.pictures(evidence.samples, sets, first, kept)
        yield alarms.part_dominates(evidence.samples, evidence.factors, limits.part_share)
        if held_out is not None and "log_ratio" in held_out.column_names:
            yield self.far(held_out, evidence)
        yield alarms.loss_diverges(evidence.losses, limits.loss_factor)
        yield alarms.equal_scores(evidence.samples, limits.equal_share)
        own = evidence.samples.filter(pc.equal(evidence.samples.column("source"), "policy"))
        answers = {"generated": own, **({} if held_out is None else {"held_out": held_out})}
        yield alarms.identical_candidates(answers, limits.identical_share)
        yield alarms.empty_answers(answers | {"kept": kept}, limits.empty_share)
        yield alarms.cut_off(answers | {"kept": kept}, limits.cut_off_share)

    def far(self, held_out: pa.Table, evidence: MonitorInput) -> Alarm | None:
        """By the budget, or without one by what selection can teach."""
        if self.config.max_kl is not None:
            return alarms.kl_beyond_budget(held_out, self.config.max_kl)
        pool = evidence.samples.num_rows / max(1, len(pc.unique(evidence.samples.column("prompt_id"))))
        return alarms.kl_beyond_selection(held_out, evidence.round, pool, self.config.max_kl_per_token)

    def pictures(
        self, samples: pa.Table, sets: Mapping[str, Mapping[str, Any]], first: Mapping[str, Any], kept: pa.Table
    ) -> Iterator[Alarm | None]:
        """The outcome of the rules about images."""
        limits, drawn = self.config, samples.filter(pc.equal(samples.column("source"), "policy"))
        yield picture_alarms.saturation_drifts(sets, first, kept, limits.saturation_drift)
        yield picture_alarms.contrast_drops(sets, first, kept, limits.contrast_drop)
        yield picture_alarms.diversity_drops(sets, first, drawn, kept, limits.diversity_drop)
        yield picture_alarms.near_duplicates(sets, first, kept, limits.duplicate_rise)


def kept_of(samples: pa.Table) -> pa.Table:
    return samples.filter(pc.greater(samples.column("weight"), 0))


def numbers(samples: pa.Table, weights: FloatArray) -> dict[str, Any]:
    """How many samples there are, and the weighted means of what is known of them."""
    found: dict[str, Any] = {"samples": samples.num_rows}
    columns = {"score": "reward", "length": "length", "clipped": "clipped_ratio"}
    columns |= {name: name for name in picture_alarms.KNOWN}
    columns |= {name: name for name in samples.column_names if name.startswith("rewards/")}
    for name, measure in columns.items():
        if name in samples.column_names:
            known = np.isfinite(values := column(samples, name))
            if weights[known].sum() > 0:
                found[measure] = float(np.average(values[known], weights=weights[known]))
    return found


def words(samples: pa.Table) -> dict[str, Any]:
    """The measures of how varied the texts are, and the share of them that nearly repeat one of another prompt."""
    texts = texts_of(samples)
    numbered_texts = numbered(texts)
    found: dict[str, Any] = {f"distinct_{n}": distinct(numbered_texts, n) for n in (1, 2)}
    found |= {f"unique_{n}": unique(numbered_texts, n) for n in (1, 2)}
    found |= {"msttr_100": msttr(numbered_texts), "words": len(numbered_texts.ids)}
    if texts:
        repeated = sum(map(len, alarms.repeats(texts, prompt_numbers(samples))))
        found["near_duplicates"] = repeated / len(texts)
    return {name: value for name, value in found.items() if value is not None}


def mean_of(name: str, found: FloatArray) -> dict[str, Any]:
    """The mean of what is finite, under this name; nothing where nothing is."""
    finite = found[np.isfinite(found)]
    return {name: float(finite.mean())} if len(finite) else {}
