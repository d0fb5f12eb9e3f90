"""What a target is called and which revision it is, from where its folder lies. No torch.

The hub's own tools leave this behind: a cache names its folders after model and commit, and a download into
a folder notes the commit beside each file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from paceline.regular_files import read_regular

_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
NOTE = Path(".cache/huggingface/download/config.json.metadata")
NOTE_BYTES_MAX = 1 << 16


@dataclass(frozen=True)
class TargetOrigin:
    """`name`: a hub id, or the folder's absolute path; `revision`: a commit of the hub, "" if unknown."""

    name: str
    revision: str = ""


def origin_of(folder: Path) -> TargetOrigin:
    path = str(folder.resolve())
    if cached := _CACHED.search(path):
        return TargetOrigin(f"{cached[1]}/{cached[2]}", cached[3])
    return TargetOrigin(path, _noted_commit(folder))


def _noted_commit(folder: Path) -> str:
    try:
        first = read_regular(folder / NOTE, NOTE_BYTES_MAX).decode().splitlines()[0].strip()
    except (OSError, UnicodeDecodeError, IndexError):
        return ""
    return first if _COMMIT.fullmatch(first) else ""
