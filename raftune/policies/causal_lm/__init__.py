"""The causal-LM family."""

from __future__ import annotations

from raftune.policies.causal_lm.policy import CausalLM

__all__ = ["CausalLM"]
