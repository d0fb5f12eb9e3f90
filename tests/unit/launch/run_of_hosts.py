"""A run file of several hosts; none of what it names exists."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Write = Callable[..., Path]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"name": "my-run", "directory": "/data/runs/my-run"},
    "target": {"model": "/data/model"},
    "data": {"path": "/data/chats.jsonl", "max_answer_tokens": 64},
    "engine": {"name": "transformers", "device": "cuda:1"},
    "features": {"store": "directory", "directory": "/data/features", "budget_mib": 4096},
    "ledger": {"store": "redis"},
    "training": {"device": "cuda:0", "batch_size": 64},
    "evaluation": {"prompts": "/data/heldout.jsonl"},
}
ALONE = {"features": {"store": "shm", "budget_mib": 4096}, "ledger": {"store": "sqlite"}}
