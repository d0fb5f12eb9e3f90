"""What is released: the wheel holds what the package needs, and one commit gives one sequence of bytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import paceline

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EPOCH = "1700000000"  # SOURCE_DATE_EPOCH, in seconds


def built(source: Path, out: Path) -> list[Path]:
    """The sdist and the wheel of a source folder, by the build backend that pyproject.toml names."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out)],
        cwd=source,
        env={"SOURCE_DATE_EPOCH": EPOCH, "PATH": ""},
        capture_output=True,
        check=True,
    )
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist of this source, after a second build elsewhere gave the same bytes."""
    folder = tmp_path_factory.mktemp("release")
    ignored = shutil.ignore_patterns("__pycache__", ".*", "models", "runs")
    names = [*PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"], "pyproject.toml"]
    for place in ("here", "there"):
        for name in [*names, "README.md", "LICENSE"]:
            source, copy = ROOT / name, folder / place / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=ignored, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(source, copy)
    first, second = (built(folder / place, folder / f"dist-{place}") for place in ("here", "there"))
    assert [path.name for path in first] == [path.name for path in second]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    wheel, sdist = sorted(first, key=lambda path: path.suffix != ".whl")
    return wheel, sdist


def test_the_wheel_holds_the_package_and_nothing_else(release: tuple[Path, Path]) -> None:
    """Its SQL, its Lua scripts and the mark that it is typed, too."""
    inside = set(zipfile.ZipFile(release[0]).namelist())
    files = {
        path.relative_to(ROOT / "src") for path in (ROOT / "src" / "paceline").rglob("*") if path.is_file()
    }
    expected = {str(path) for path in files if "__pycache__" not in path.parts}
    assert {name for name in inside if ".dist-info/" not in name} == expected
    assert "paceline/py.typed" in expected
    assert {Path(name).suffix for name in expected} >= {".py", ".sql", ".lua", ".typed"}
    assert f"paceline-{paceline.__version__}-py3" in release[0].name


def test_the_sdist_holds_tests_and_documents(release: tuple[Path, Path]) -> None:
    """Who packages it for a distribution can run them."""
    with tarfile.open(release[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"tests/conftest.py", "docs/guarantees.md", "constraints.txt", "LICENSE"} <= names


def test_every_extra_is_documented_where_it_is_named() -> None:
    """An extra that nothing installs or tells of is a promise that nobody keeps."""
    told = "".join(
        path.read_text()
        for path in [
            ROOT / "README.md",
            ROOT / "Makefile",
            *(ROOT / "docs").glob("*.md"),
            ROOT / "scripts/install.sh",
        ]
    )
    for extra in PROJECT["project"]["optional-dependencies"]:
        assert f"[{extra}]" in told, extra
