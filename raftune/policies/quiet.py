"""Silence, under the name that policies know it by."""

from raftune.quiet import quiet

__all__ = ["quiet"]
