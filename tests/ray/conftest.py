"""Fixtures of whole runs."""

from __future__ import annotations

from paceline.testing.run_fixtures import tiny_model

__all__ = ["tiny_model"]
