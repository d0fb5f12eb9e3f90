"""Which methods' drafts an export takes, for callers that ask before there is a draft. No torch.

A test compares it with the exports themselves (exports/servers.py).
"""

from __future__ import annotations

from collections.abc import Mapping

_BLOCKS = ("dflash", "dspark", "domino", "dflash2")
TAKEN: Mapping[str, tuple[str, ...]] = {
    "vllm": ("eagle3", "p-eagle", "dflash", "dspark", "dflash2"),
    "sglang": ("eagle3", *_BLOCKS),
    "hf": ("eagle3", *_BLOCKS),
    "speculators": ("eagle3", "p-eagle"),
}


def servers_of(method: str) -> list[str]:
    """The inference servers whose export takes a draft of the method."""
    return [server for server in ("vllm", "sglang") if method in TAKEN[server]]
