"""The tabular family: a table of logits, the method at its smallest."""
