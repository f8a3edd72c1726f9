"""A configuration becomes a running run: assembly, preflight, staleness, workers, trackers, progress."""
