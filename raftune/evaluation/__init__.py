"""Metrics of a policy: rewards with intervals, best-of-n, KL, diversity, paired win rates."""
