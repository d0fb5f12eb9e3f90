"""What binds a run to its target and its numbers, and from when on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.errors import ConfigError
from paceline.ledger.locks import RoleLock
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles.target_binding import (
    DRAFT_NUMERICS,
    TARGET_NUMERICS,
    bind_numerics,
    bind_target,
    refuse_other_target,
)
from paceline.testing.ledger_calls import capture, producer_of
from paceline.testing.tiny_folder import make_tiny_folder

CPU, CUDA = ({"dtype": "float32", "device": kind} for kind in ("cpu", "cuda"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("targets") / "one")


@pytest.fixture
def other(one: Path, tmp_path: Path) -> Path:
    """The same target, but for the token that ends its answers."""
    folder = Path(shutil.copytree(one, tmp_path / "other"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 7]}))
    return folder


def config_of(model: Path, directory: Path, *starts: Path) -> Any:
    directory.mkdir(exist_ok=True)
    return SimpleNamespace(
        target=SimpleNamespace(model=model, revision=None),
        run=SimpleNamespace(name="run", directory=directory),
        method=SimpleNamespace(folders=starts),
        machine=SimpleNamespace(producers=1),
    )


def test_the_first_of_two_starts_decides(one: Path, other: Path, tmp_path: Path) -> None:
    """The other one, which meets a live role, is refused whoever it is."""
    ledger, directory = SQLiteLedger(), tmp_path / "run"
    bind_target(ledger, config_of(one, directory), "producer")
    lock = RoleLock(directory, "producer")
    with pytest.raises(ConfigError, match="holds another model than the one"):
        bind_target(ledger, config_of(other, directory), "consumer")
    lock.release()


def test_another_target_may_be_chosen_until_something_was_captured(
    one: Path, other: Path, tmp_path: Path
) -> None:
    """So that advice to choose another one can be followed; then never again."""
    ledger, directory = SQLiteLedger(), tmp_path / "run"
    bind_target(ledger, config_of(other, directory))
    version = bind_target(ledger, config_of(one, directory))
    assert ledger.facts()["model_version"] == version.model
    capture(producer_of(ledger), 0)
    for refuses in (bind_target, refuse_other_target):
        with pytest.raises(ConfigError, match="put the old folder back"):
            refuses(ledger, config_of(other, directory))
    assert bind_target(ledger, config_of(one, directory)) == version


def test_the_folder_that_the_draft_starts_from_binds_like_the_target(
    one: Path, other: Path, tmp_path: Path
) -> None:
    """Its content decides first weights, layers and sizes."""
    ledger, directory, start = SQLiteLedger(), tmp_path / "run", tmp_path / "start"
    shutil.copytree(one, start)
    bind_target(ledger, config_of(one, directory, start))
    capture(producer_of(ledger), 0)
    bind_target(ledger, config_of(one, directory, start))
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    for refuses in (bind_target, refuse_other_target):
        with pytest.raises(ConfigError, match="has changed since this run was started"):
            refuses(ledger, config_of(one, directory, start))


def test_a_reader_records_nothing(one: Path, tmp_path: Path) -> None:
    """An evaluation of a run that knows no target leaves it so."""
    ledger = SQLiteLedger()
    refuse_other_target(ledger, config_of(one, tmp_path / "run"))
    assert "model_version" not in ledger.facts()


def test_type_and_device_bind_with_the_first_capture(one: Path, tmp_path: Path) -> None:
    """Those of the draft only with the first checkpoint."""
    ledger, config = SQLiteLedger(), config_of(one, tmp_path / "run")
    for fact in (TARGET_NUMERICS, DRAFT_NUMERICS):
        bind_numerics(ledger, config, "producer", fact, CUDA)
        bind_numerics(ledger, config, "producer", fact, CPU)
    capture(producer_of(ledger), 0)
    bind_numerics(ledger, config, "consumer", DRAFT_NUMERICS, CUDA)
    bind_numerics(ledger, config, "producer", TARGET_NUMERICS, CPU)
    with pytest.raises(ConfigError, match=r"target in float32 on cpu, and would now compute in .* cuda"):
        bind_numerics(ledger, config, "producer", TARGET_NUMERICS, CUDA)
