"""Assembles and runs a run: preflight, staleness, workers, trackers, progress."""
