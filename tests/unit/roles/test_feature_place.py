"""Two roles that would look for features in different places are told so before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.errors import StoreError
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles import workers
from paceline.roles.feature_folder import record_place, refuse_other_place
from paceline.testing.tiny_run import TinyRun


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_run_config(TinyRun(tmp_path / "tiny", tmp_path).run_file)


def elsewhere(config: RunConfig, folder: Path) -> RunConfig:
    folder.mkdir()
    return config.model_copy(update={"features": config.features.model_copy(update={"directory": folder})})


def test_a_consumer_that_looks_elsewhere_is_refused_with_both_places(
    config: RunConfig, tmp_path: Path
) -> None:
    """It names what the producer has recorded and what it was given itself."""
    ledger, other = SQLiteLedger(), elsewhere(config, tmp_path / "other")
    record_place(config, ledger)
    with pytest.raises(StoreError, match=r"features\.directory") as caught:
        refuse_other_place(other, ledger)
    assert str(config.feature_folder) in str(caught.value)
    assert str(other.feature_folder) in str(caught.value)
    refuse_other_place(config, ledger)


def test_a_directory_that_was_changed_for_both_is_fine(config: RunConfig, tmp_path: Path) -> None:
    """`paceline train` records the new one before it starts the roles."""
    ledger, other = SQLiteLedger(), elsewhere(config, tmp_path / "other")
    record_place(config, ledger)
    record_place(other, ledger)
    refuse_other_place(other, ledger)


def test_a_run_without_a_producer_yet_refuses_no_consumer(config: RunConfig) -> None:
    """Whichever role comes first."""
    refuse_other_place(config, SQLiteLedger())


@pytest.mark.parametrize(("same_boot", "refused"), [(True, True), (False, False)])
def test_another_mount_under_the_same_path_is_another_place(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_boot: bool, refused: bool
) -> None:
    """Two containers have a /dev/shm each; after a reboot the same one has another number, too."""
    ledger = SQLiteLedger()
    record_place(config, ledger)
    recorded = ledger.facts()["features_lie"]
    ledger.set_facts(None, {"features_lie": {**recorded, "device": recorded["device"] + 1}})
    if not same_boot:
        boot = tmp_path / "boot_id"
        boot.write_text("another boot\n")
        monkeypatch.setattr(workers, "BOOT_ID", boot)
    if refused:
        with pytest.raises(StoreError, match="another mount"):
            refuse_other_place(config, ledger)
    else:
        refuse_other_place(config, ledger)
