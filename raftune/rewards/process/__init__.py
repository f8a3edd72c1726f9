"""Rewards in processes of their own: client, server, protocol, threads."""
