"""What the families share when they train: fit, checkpoints, memory, devices, length grouping."""
