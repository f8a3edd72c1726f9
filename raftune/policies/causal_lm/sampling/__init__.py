"""Generation of completions: backends, KV cache, token choice, parity check."""
