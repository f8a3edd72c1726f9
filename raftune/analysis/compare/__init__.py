"""Two rounds or runs, compared pair by pair: by what they recorded, by other rewards, and by a judge."""

from raftune.analysis.compare.compare import Comparison, compare, document
from raftune.analysis.compare.measures import ComparisonMeasure, JudgeSpec

__all__ = ["Comparison", "ComparisonMeasure", "JudgeSpec", "compare", "document"]
