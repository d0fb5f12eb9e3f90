"""A verb that is given a run's folder reads the ledger where it is now."""

from __future__ import annotations

from pathlib import Path

from paceline.cli.named_run import run_file_of
from paceline.config.load import flat, load_run_config, parse_run_config
from paceline.ledger.facts import CONFIG
from paceline.ledger.place import opened
from paceline.ledger.settings import SqliteSection


def test_the_ledger_may_have_moved_since_the_first_start(tmp_path: Path) -> None:
    """The recorded settings are those of the first start; ledger.json knows better."""
    given = {
        "run": {"name": "r", "directory": str(tmp_path)},
        "target": {"model": "models/m"},
        "prompts": {"path": "p.jsonl"},
        "evaluation": {"prompts": "h.jsonl"},
        "ledger": {"store": "redis", "url": "redis://cave:6379/0"},
    }
    ledger = opened(SqliteSection(durability="full"), tmp_path, "r")
    ledger.set_facts(None, {CONFIG: flat(parse_run_config(given, source="run.yaml"))})
    ledger.close()
    assert load_run_config(run_file_of(tmp_path)).ledger == SqliteSection(durability="full")
