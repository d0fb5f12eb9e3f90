"""What Triton's small C file needs on a machine with a GPU; each lack with the packages that mend it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from paceline import c_compiler as module
from paceline.c_compiler import has_compiled_before, missing_for_triton

OF_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a Python.h, where this Python's are looked for."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").write_text("#define PY_MAJOR_VERSION 3\n")
    monkeypatch.setattr(module, "_headers", lambda: tmp_path / "include")
    return tmp_path / "include"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder where programs are found; it is empty."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "bin"


def compiler_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_either_compiler_will_do(name: str, headers: Path, programs: Path) -> None:
    compiler_in(programs, name, "exit 0")
    assert missing_for_triton() is None


def test_a_slim_image_has_neither_compiler_nor_headers(headers: Path, programs: Path) -> None:
    """Both are told at once, with one command for both."""
    (headers / "Python.h").unlink()
    missing = missing_for_triton()
    assert missing is not None
    assert missing.what == "There is no C compiler (gcc or clang), and no Python.h."
    assert f"apt-get install gcc libc6-dev {OF_PYTHON}`" in missing.mend


def test_headers_alone_are_missing_where_only_the_compiler_was_installed(
    headers: Path, programs: Path
) -> None:
    compiler_in(programs, "gcc", "exit 0")
    (headers / "Python.h").unlink()
    missing = missing_for_triton()
    assert missing is not None
    assert str(headers / "Python.h") in missing.what
    assert f"`apt-get install {OF_PYTHON}`" in missing.mend


def test_cc_names_the_compiler_and_nothing_else_is_tried(
    headers: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton does not look further, either."""
    compiler_in(programs, "gcc", "exit 0")
    monkeypatch.setenv("CC", "gcc-99")
    missing = missing_for_triton()
    assert missing is not None
    assert "CC is gcc-99" in missing.what
    assert "correct CC" in missing.mend


def test_a_compiler_without_the_c_library_is_found_by_trying_it(headers: Path, programs: Path) -> None:
    """gcc installs without it where recommended packages are left out; the last word is the compiler's."""
    compiler_in(programs, "gcc", "echo 'trial.c:1: fatal error: stdlib.h: No such file' >&2; exit 1")
    missing = missing_for_triton()
    assert missing is not None
    assert "fatal error: stdlib.h" in missing.what
    assert "libc6-dev" in missing.mend
    compiler_in(programs, "gcc", "exit 3")
    missing = missing_for_triton()
    assert missing is not None
    assert "it ended with 3" in missing.what


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("TRITON_CACHE_DIR", "x"),
        ("TRITON_HOME", ".triton/cache/x"),
        ("TORCHINDUCTOR_CACHE_DIR", "triton/0/x"),
    ],
)
def test_what_triton_has_compiled_earlier_is_found_where_it_keeps_it(
    variable: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own folder, in that of torch's compiler, or where the environment says."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    for name in ("TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR", variable):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert not has_compiled_before()
    place = tmp_path / variable / folder
    place.mkdir(parents=True)
    (place / "cuda_utils.cpython-311-x86_64-linux-gnu.so").touch()
    assert has_compiled_before()
