from __future__ import annotations

from paceline.testing.run_fixtures import commands_are_forks, memory_of_runs_is_freed, tiny_model

__all__ = ["commands_are_forks", "memory_of_runs_is_freed", "tiny_model"]
