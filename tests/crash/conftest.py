from __future__ import annotations

from paceline.testing.run_fixtures import forked_commands, memory_of_runs_is_freed, tiny_model

__all__ = ["forked_commands", "memory_of_runs_is_freed", "tiny_model"]
