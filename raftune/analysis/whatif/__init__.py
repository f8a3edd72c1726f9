"""What-if runs: other rewards, rules or a smaller K, applied to samples that a run has generated."""

from __future__ import annotations

from raftune.analysis.whatif.difference import Difference
from raftune.analysis.whatif.run import WhatIfResult, rescore, reselect

__all__ = ["Difference", "WhatIfResult", "rescore", "reselect"]
