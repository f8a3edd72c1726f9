"""Analyses of finished runs: comparison of two runs or rounds, and what-if selections."""
