"""Results of a run directory: summary, samples, status, metrics, export, model card."""
