"""The command lines by which inference servers serve a target with an exported draft. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from paceline.errors import ConfigError


@dataclass(frozen=True)
class Served:
    """A target (a hub id or a path), the folder of its draft, and how a server drafts with it.

    `revision`: the commit of a hub's target; "" for a path, or if it is unknown.
    """

    target: str
    folder: str
    method: str
    chain: int
    host: str = "127.0.0.1"
    revision: str = ""


# Methods whose drafts a server loads by another method's name, from their config.
BY_ANOTHER_NAME = {"domino": "dflash", "dflash2": "dflash", "p-eagle": "eagle3"}


def _vllm(served: Served) -> list[str]:
    method = BY_ANOTHER_NAME.get(served.method, served.method)
    speculation: dict[str, Any] = {
        "model": served.folder,
        "method": method,
        "num_speculative_tokens": served.chain,
    }
    if served.method == "p-eagle":
        speculation["parallel_drafting"] = True
    command = ["vllm", "serve", served.target, *_at(served), "--host", served.host]
    return [*command, "--speculative-config", json.dumps(speculation)]


def _sglang(served: Served) -> list[str]:
    command = ["python", "-m", "sglang.launch_server", "--model-path", served.target, *_at(served)]
    command += ["--host", served.host]
    method = BY_ANOTHER_NAME.get(served.method, served.method)
    command += ["--speculative-algorithm", method.upper()]
    command += ["--speculative-draft-model-path", served.folder]
    if method != "eagle3":  # a block's size is read from the config
        return command
    command += ["--speculative-num-steps", str(served.chain), "--speculative-eagle-topk", "1"]
    return [*command, "--speculative-num-draft-tokens", str(served.chain + 1)]


def _at(served: Served) -> list[str]:
    return ["--revision", served.revision] if served.revision else []


SERVERS: Mapping[str, Callable[[Served], list[str]]] = {"vllm": _vllm, "sglang": _sglang}
# The servers that load a format, the first of them by default.
LOADED_BY: Mapping[str, tuple[str, ...]] = {
    "vllm": ("vllm",),
    "speculators": ("vllm",),
    "sglang": ("sglang", "vllm"),
    "hf": ("sglang", "vllm"),
}
NOT_LOADED = {("vllm", "domino")}


def commands(format_name: str, served: Served) -> dict[str, list[str]]:
    """By the server's name; {} for a format of another package. Raises ConfigError for a target's name that a
    server would take for an option."""
    if any(text.startswith("-") for text in (served.target, served.folder, served.revision)):
        raise ConfigError(
            f"{served.target!r} is no name of a target.",
            why="It begins with a hyphen, so a server would take it for an option.",
            next="export again, with --target-name set to a hub id or a path.",
        )
    servers = (s for s in LOADED_BY.get(format_name, ()) if (s, served.method) not in NOT_LOADED)
    return {server: SERVERS[server](served) for server in servers}
