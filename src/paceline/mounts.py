"""Which kind of filesystem a path is on, and how to see what other hosts changed there. Standard library."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

NETWORK_FILESYSTEMS = frozenset(
    [
        *("9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"),
        *("ocfs2", "orangefs", "panfs", "smb2", "smb3", "smbfs", "virtiofs", "wekafs"),
        *("fuse.ceph-fuse", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs", "fuse.s3fs", "fuse.sshfs"),
    ]
)
MOUNTS = Path("/proc/self/mountinfo")
LOOK = ".look-"  # how the name of a file begins that `look_anew` makes


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that holds `path`, as the kernel names it; "" if unknown."""
    return mount_of(path)[1]


def mount_of(path: Path) -> tuple[str, str]:
    """Where the filesystem that holds `path` is mounted, with a slash at the end, and its type; "" if
    unknown. The path need not exist."""
    if not MOUNTS.exists():
        return "", ""
    target = os.path.join(path.resolve(), "")  # noqa: PTH118 (ends with a slash)
    deepest, kind = "", ""
    for line in os.fsdecode(MOUNTS.read_bytes()).split("\n")[:-1]:
        left, _, right = line.partition(" - ")
        point = os.path.join(_unescaped(left.split(" ")[4]), "")  # noqa: PTH118
        # Later lines are mounted over earlier ones, so the same point replaces.
        if target.startswith(point) and len(point) >= len(deepest):
            deepest, kind = point, right.split(" ")[0]
    return deepest, kind


def _unescaped(point: str) -> str:
    """A mount point, in which the kernel writes spaces, tabs, newlines and backslashes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point) if "\\" in point else point


def is_on_network(path: Path) -> bool:
    return filesystem_of(path) in NETWORK_FILESYSTEMS


def look_anew(folder: Path) -> None:
    """Have this host see the names that other hosts have made in the folder; no error if there is none.

    A network filesystem's client may answer from what it saw up to a minute ago. A change that it makes
    itself shows it that the folder was changed, and it asks the server again.
    """
    probe = folder / f"{LOOK}{secrets.token_hex(8)}"
    with suppress(OSError):
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        probe.unlink()
