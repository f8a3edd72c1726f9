"""The interval of a mean, under the name that evaluation knows it by."""

from raftune.interval import BLOCK, RESAMPLES, Interval, draw_blocks, interval, mean_by_prompt, one_block, resamples

__all__ = ["BLOCK", "RESAMPLES", "Interval", "draw_blocks", "interval", "mean_by_prompt", "one_block", "resamples"]
