"""How completions are generated: backends, KV cache, token choice, parity check."""
