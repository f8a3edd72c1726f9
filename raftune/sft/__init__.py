"""Supervised fine-tuning before the first round."""

from raftune.sft.work import SftOutcome, sft

__all__ = ["SftOutcome", "sft"]
