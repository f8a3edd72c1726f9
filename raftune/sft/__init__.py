"""Supervised fine-tuning: a policy's own `encode_completion` and `train` on a data set of answers, before the first
round.

work.py    the steps, each skipped where its output is there
rows.py    which answers are learned from and which are held out, as the policy reads them
"""

from raftune.sft.work import SftOutcome, sft

__all__ = ["SftOutcome", "sft"]
