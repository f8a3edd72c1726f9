"""Policy families: tabular, causal_lm and diffusion."""
