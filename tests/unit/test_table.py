"""Components are found by name: ours, and those of packages that are installed beside us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paceline.config.load import parse_run_config
from paceline.engines.table import ENGINES
from paceline.errors import ConfigError
from paceline.exports.table import EXPORTS
from paceline.features.table import STORES
from paceline.ledger.table import LEDGERS
from paceline.methods.table import METHODS
from paceline.table import resolve
from paceline.trackers.table import TRACKERS

ROOT = Path(__file__).parents[2]
TABLES = {table.group: table for table in (METHODS, ENGINES, STORES, EXPORTS, LEDGERS, TRACKERS)}
MODULE = """
from typing import ClassVar, Literal
from paceline.methods.settings import MethodSection

class PopularSection(MethodSection):
    component: ClassVar[str] = "popular_draft:Popular"
    name: Literal["popular"] = "popular"
    top_words: int = 5

class Popular:
    name = "popular"
    def __init__(self, section):
        self.words = section.top_words
"""
RUN = {
    "run": {"name": "r", "directory": "runs/r"},
    "target": {"model": "models/m"},
    "prompts": {"path": "p.jsonl"},
    "evaluation": {"prompts": "h.jsonl"},
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution as pip would lay it out, with one component of each kind and one that is broken."""
    info = tmp_path / "popular_draft-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: popular-draft\nVersion: 1.0\n")
    groups = [f"[{group}]\npopular = popular_draft:PopularSection\n" for group in TABLES]
    broken = "[paceline.methods]\npopular = popular_draft:PopularSection\nbroken = no_such_module:X\n"
    ours = "eagle3 = no_such_module:Eagle3\n"
    (info / "entry_points.txt").write_text(broken + ours + "".join(groups[1:]))
    (tmp_path / "popular_draft.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "popular_draft", raising=False)
    return tmp_path


@pytest.mark.parametrize("group", TABLES)
def test_an_installed_component_is_found_beside_ours(installed: Path, group: str) -> None:
    """Nothing of it is imported before it is asked for by its name."""
    table = TABLES[group]
    assert "popular" in table.names()
    assert "popular_draft" not in sys.modules
    assert table.find("popular").__name__ == "PopularSection"
    for name in table.own:
        assert resolve(table.own[name]) is table.find(name)


def test_a_run_file_names_an_installed_method_and_its_own_knobs(installed: Path) -> None:
    """Its section is validated like ours, and built into its method."""
    config = parse_run_config({**RUN, "method": {"name": "popular", "top_words": 7}}, source="run.yaml")
    assert config.method.build().words == 7  # type: ignore[attr-defined]
    assert config.method.first_samples == 128
    with pytest.raises(ConfigError, match=r"method\.top_word.*did you mean 'top_words'"):
        parse_run_config({**RUN, "method": {"name": "popular", "top_word": 7}}, source="run.yaml")
    with pytest.raises(ConfigError, match=r"method\.draft_vocab_size.*known: name, first_samples, dtype"):
        parse_run_config({**RUN, "method": {"name": "popular", "draft_vocab_size": 7}}, source="run.yaml")


def test_a_wrong_name_lists_what_there_is(installed: Path) -> None:
    """The nearest name, and all of them; what another package offers under our name is not taken."""
    with pytest.raises(ConfigError, match=r"did you mean 'popular'\?.*eagle3.*, broken, popular"):
        METHODS.find("populr")
    assert METHODS.find("eagle3").__module__ == "paceline.methods.eagle3.settings"


def test_a_component_that_cannot_be_loaded_names_its_package(installed: Path) -> None:
    """One clear error, and not before it is asked for."""
    with pytest.raises(ConfigError, match=r"'broken' of popular-draft cannot be loaded.*no_such_module"):
        METHODS.find("broken")


def test_a_run_file_is_read_without_torch() -> None:
    """`paceline status` answers at once: sections lie in files of their own."""
    code = (
        "import sys; from pathlib import Path; from paceline.config.load import load_run_config; "
        "load_run_config(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    recipe = ROOT / "recipes" / "smollm2-cpu.yaml"
    subprocess.run([sys.executable, "-c", code, str(recipe)], check=True, timeout=120)
