"""Rewards in their own processes: client, server, protocol, threads."""
