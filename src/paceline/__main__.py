"""`python -m paceline`: the same command."""

from __future__ import annotations

from paceline.cli.main import main

main()
