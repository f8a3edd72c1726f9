"""The stages of a round, one file each: inputs, configuration fields and outputs."""
