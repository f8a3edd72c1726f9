"""What a run directory says: summary, samples, status, metrics, export, model card."""
