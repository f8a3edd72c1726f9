"""Comparison of two rounds or runs, by recorded rewards, other rewards, and a judge."""

from raftune.analysis.compare.compare import Comparison, compare, document
from raftune.analysis.compare.measures import ComparisonMeasure, JudgeSpec

__all__ = ["Comparison", "ComparisonMeasure", "JudgeSpec", "compare", "document"]
