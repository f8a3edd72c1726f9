"""Engines, which run chunks of prompts."""
