"""Training objectives, built-in and custom, and the coefficients of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raftune.arrays import FloatArray
from raftune.config.extensions import GUIDE, code_hash, load_extension, register
from raftune.config.training import CustomTraining, SftTraining, TrainingConfig
from raftune.errors import ConfigError, DataError, ExtensionError
from raftune.protocols import LearnedModel, Objective

Normalization = Literal["token", "sample", "prompt"]
METHODS = {"rows": ("samples", "verdicts"), "loss": ("model", "batch")}
NEEDS = frozenset({"kept", "rejected"})
OBJECTIVES: dict[str, type[Objective]] = {}  # the built-in objectives, by training.objective


@register(OBJECTIVES, "sft")
class Sft:
    """The weighted loss of the kept samples: negative log-likelihood of tokens, or squared error of latents."""

    needs: frozenset[str] = frozenset({"kept"})

    def rows(self, samples: pa.Table, verdicts: pa.Table) -> pa.Table:
        """The samples, each with the weight that selection gave it."""
        return samples.append_column("weight", verdicts.column("weight").combine_chunks())

    def loss(self, model: LearnedModel, batch: Any) -> tuple[Any, Any]:
        """The sum of weight x loss over the units of the batch, and the weight that it is a mean over."""
        losses, weights, mass = model.terms(batch)
        return weights @ losses, mass


def load_objective(config: TrainingConfig) -> Objective:
    """The configured objective. Raises ConfigError where a custom one is missing or incomplete."""
    if not isinstance(config, CustomTraining):
        return OBJECTIVES[config.objective if isinstance(config, SftTraining) else "sft"]()
    custom: Objective = load_extension(
        config.objective,
        "training.objective",
        config.options,
        "training.options",
        methods=METHODS,
        attributes=("needs",),
    )
    needs: Any = custom.needs
    if not isinstance(needs, set | frozenset | tuple | list) or not needs or not set(needs) <= NEEDS:
        raise ConfigError(
            f"training.objective: `needs` of {config.objective} must be of {', '.join(sorted(NEEDS))}; got {needs!r}. "
            f"{GUIDE}"
        )
    return custom


def objective_code(config: TrainingConfig) -> dict[str, str]:
    """The hash of the file that a custom objective is read from: other code is another training."""
    return {"objective's classes": code_hash(config.objective)} if isinstance(config, CustomTraining) else {}


def chosen_rows(objective: Objective, name: str, samples: pa.Table, verdicts: pa.Table) -> pa.Table:
    """The rows to train on, with a column `weight`. Raises ExtensionError where `rows` of the objective is wrong."""
    kept = pc.greater(verdicts.column("weight"), 0.0)
    if "rejected" not in objective.needs:
        samples, verdicts = samples.filter(kept), verdicts.filter(kept)
    elif "kept" not in objective.needs:
        samples, verdicts = samples.filter(pc.invert(kept)), verdicts.filter(pc.invert(kept))
    if type(objective) is Sft:
        return objective.rows(samples, verdicts)
    try:
        rows = objective.rows(samples, verdicts)
    except Exception as error:
        raise ExtensionError(
            f"training.objective: `rows` of {name} raised {type(error).__name__}: {error}. Fix it and resume the run."
        ) from error
    missing = {*samples.column_names, "weight"} - {*getattr(rows, "column_names", ())}
    if not isinstance(rows, pa.Table) or missing:
        result = f"a table without {', '.join(sorted(missing))}" if isinstance(rows, pa.Table) else type(rows).__name__
        raise ExtensionError(
            f"training.objective: `rows` of {name} must return a pyarrow.Table of rows of `samples` with all their "
            f"columns and a column `weight`; got {result}. Fix it and resume the run."
        )
    return rows


def read_weighted(path: Path, columns: Sequence[str]) -> tuple[pa.Table, FloatArray, int]:
    """These columns of a round's rows, their weights, and the round. Raises DataError for a weight that is none."""
    table = pq.read_table(path, columns=[*columns, "weight"], use_threads=False)
    weights = np.asarray(table.column("weight").to_numpy(), dtype=np.float64)
    if (bad := weights[~(np.isfinite(weights) & (weights >= 0))]).size:
        raise DataError(f"Every row's weight must be finite and not negative; got {bad[0]} in {path.name}.")
    return table, weights, int((table.schema.metadata or {}).get(b"raftune.round", b"0"))


def coefficients(
    weights: FloatArray, tokens: Sequence[int], prompts: Sequence[str], normalization: Normalization, step: int
) -> FloatArray:
    """(N,) the factor of each token of a row, so that an average step minimises the named mean over all rows.

    A mean within each step of `step` rows would, with steps of similar length, turn "token" into "sample". The tokens
    of an image are the elements of its latents, with squared errors as losses.

    token:  sum_i w_i nll_i / sum_i w_i T_i                                every token weighs the same
    sample: sum_i w_i (nll_i / T_i) / sum_i w_i                            every sample weighs the same
    prompt: mean over prompts x of sum_{i in x} w_i (nll_i / T_i) / sum_{i in x} w_i    every prompt weighs the same
    """
    lengths = np.asarray(tokens, dtype=np.float64)
    if normalization == "token":
        shares, total = weights, float(weights @ lengths)
    elif normalization == "sample":
        shares, total = weights / lengths, float(weights.sum())
    else:
        _, owner = np.unique(np.asarray(prompts), return_inverse=True)
        of_prompt = np.bincount(owner, weights=weights)
        shares, total = weights / of_prompt[owner] / lengths, float(len(of_prompt))
    return np.asarray(shares * max(1.0, len(weights) / step) / total, dtype=np.float64)
