"""Families of generative models behind the protocol Policy."""
