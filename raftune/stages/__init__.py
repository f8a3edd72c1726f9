"""The stages of a round: inputs, configuration fields and outputs of each."""
