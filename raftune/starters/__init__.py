"""Bundled tiny models and generators of their data: no hub, no GPU."""
