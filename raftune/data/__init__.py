"""Readers of prompts, images and human feedback. Every skipped row is reported with its reason."""
