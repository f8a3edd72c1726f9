"""The causal-LM family: `CausalLM`, and beneath it loading, encoding, generating, training and saving."""

from __future__ import annotations

from raftune.policies.causal_lm.policy import CausalLM

__all__ = ["CausalLM"]
