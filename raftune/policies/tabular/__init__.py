"""The tabular family: a table of logits, for tests and examples."""
