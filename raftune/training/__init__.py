"""Training code that families share: fit, checkpoints, memory, devices, length grouping."""
