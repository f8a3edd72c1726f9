"""What a policy is worth: rewards with intervals, best-of-n curves, divergence, diversity, paired win rates."""
