"""The run directory: layout, atomic commits, verification, lock."""
