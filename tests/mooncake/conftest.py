"""Runs here start their commands from nothing: a forked process could not use Mooncake's threads."""

from paceline.testing.run_fixtures import memory_of_runs_is_freed, tiny_model

__all__ = ["memory_of_runs_is_freed", "tiny_model"]
