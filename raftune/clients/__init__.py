"""HTTP clients: chat completions, and checks of URLs."""
