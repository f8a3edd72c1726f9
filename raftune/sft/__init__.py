"""Supervised fine-tuning: a policy's own `adopt` and `tune` on a data set of answers, before the first round.

work.py    the steps, each skipped where its output is there
rows.py    which answers are learned from and which are held out, as the policy reads them
"""

from raftune.sft.work import Learned, sft

__all__ = ["Learned", "sft"]
