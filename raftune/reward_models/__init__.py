"""Reward models from human feedback: Bradley-Terry on preferences, regression on ratings."""
