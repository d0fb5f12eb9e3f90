"""What Triton's small C file needs on a machine with a GPU; each lack with the packages that mend it."""

from __future__ import annotations

import errno
import os
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
    """Triton does not look further, either, and takes it as one word."""
    compiler_in(programs, "gcc", "exit 0")
    for named, told in (("gcc-99", "gcc-99"), ("gcc -m64", "gcc -m64"), ("", "empty")):
        monkeypatch.setenv("CC", named)
        missing = missing_for_triton()
        assert missing is not None
        assert f"CC is {told}" in missing.what
        assert "correct CC" in missing.mend


def test_a_compiler_without_the_c_library_is_found_by_trying_it(headers: Path, programs: Path) -> None:
    """gcc installs without it where recommended packages are left out; the last word is the compiler's."""
    compiler_in(programs, "gcc", "echo 'trial.c:1: fatal error: stdlib.h: No such file' >&2; exit 1")
    missing = missing_for_triton()
    assert missing is not None
    assert "fatal error: stdlib.h" in missing.what
    assert "libc6-dev" in missing.mend
    compiler_in(programs, "gcc", "echo 'Aborted: of no library' >&2; echo >&2; exit 3")
    missing = missing_for_triton()
    assert missing is not None
    assert "(Aborted: of no library)" in missing.what
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


def test_a_full_disk_of_temporary_files_is_no_missing_package(
    headers: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the compiler meets it, nor where no folder can be made for it."""
    compiler_in(
        programs, "gcc", "echo 'fatal error: error writing to /tmp/x.s: No space left on device' >&2; exit 1"
    )
    told = [missing_for_triton()]
    monkeypatch.setattr(module, "TemporaryDirectory", refused)
    monkeypatch.setattr(module, "gettempdir", refused)
    told.append(missing_for_triton())
    for missing in told:
        assert missing is not None
        assert "No space left on device" in missing.what
        assert "TMPDIR" in missing.mend
        assert "apt-get" not in missing.mend
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(headers))
    assert not has_compiled_before()


def refused() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_compiler_that_hangs_is_given_up(
    headers: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    compiler_in(programs, "gcc", "while :; do :; done")
    missing = missing_for_triton()
    assert missing is not None
    assert "it did not end within" in missing.what


def test_a_compiler_of_another_language_is_asked_for_english(headers: Path, programs: Path) -> None:
    """So that its line with the error is found; bytes that are no text of this locale are replaced."""
    script = """printf '\\344\\n' >&2; [ "$LC_ALL" = C ] && echo 'fatal error: in English' >&2; exit 1"""
    compiler_in(programs, "gcc", script)
    missing = missing_for_triton()
    assert missing is not None
    assert "fatal error: in English" in missing.what


def test_a_user_without_a_home_has_compiled_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images run as users that nothing knows."""
    for name in ("HOME", "TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nothing_known)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/nowhere")
    assert not has_compiled_before()


def nothing_known(uid: int) -> None:
    raise KeyError(uid)
