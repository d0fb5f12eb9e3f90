"""What lies where a file should: read it if it is one, and never wait for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paceline.regular_files import kind_of, read_regular


def test_a_regular_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    """One byte more is refused, before it is read."""
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(path, 4)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """A FIFO without a writer, a device without an end, a folder, a link to itself, a name with NUL."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (
        tmp_path / "fifo",
        Path("/dev/zero"),
        tmp_path,
        tmp_path / "loop",
        Path("a\0b"),
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(OSError, match=r"not a regular file|Too many|NUL|too long"):
            read_regular(path, 1 << 20)


def test_kinds_are_told_without_an_exception_for_what_is_not_there(tmp_path: Path) -> None:
    """A FIFO is neither file nor folder."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    kinds = [kind_of(tmp_path / name) for name in ("fifo", "file", ".", "none", "file/below")]
    assert kinds == ["", "file", "folder", "", ""]
    with pytest.raises(OSError, match="NUL"):
        kind_of(Path("a\0b"))
