"""Processes of a run, and the only place where adapters are joined."""
