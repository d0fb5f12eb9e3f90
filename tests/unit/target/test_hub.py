"""A target by its name on the hub: from the network, from the local cache, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from paceline.errors import ConfigError
from paceline.target.hub import local_target
from paceline.target.settings import TargetSection
from paceline.testing.tiny_folder import make_tiny_folder

COMMIT, SECRET = "0123456789abcdef0123456789abcdef01234567", "hf_SecretSecretSecret"
NAME = "wind/tiny-llama"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache, with one model, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "hub" / "models--wind--tiny-llama"
    make_tiny_folder(model / "snapshots" / COMMIT)
    for revision in ("main", "v1"):
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(COMMIT)
    return model / "snapshots" / COMMIT


def section(model: object = NAME, revision: str | None = None) -> TargetSection:
    return TargetSection.parse({"model": model, "revision": revision})


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_a_cached_model_is_found_without_a_network(cache: Path, revision: str | None) -> None:
    """With the commit that the revision stands for, so that a branch that moves is noticed."""
    found = local_target(section(revision=revision))
    assert (found.model, found.revision) == (cache, COMMIT)


def test_a_folder_that_exists_wins(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the hub has a model of that name; a folder has no revisions."""
    monkeypatch.chdir(tmp_path)
    folder = make_tiny_folder(Path(NAME))
    assert local_target(section()).model == folder
    with pytest.raises(ConfigError, match=r"target.revision is 'v1'"):
        local_target(section(revision="v1"))


@pytest.mark.parametrize("model", ["/no/such/folder", "../models", "one-part", "a/b/c"])
def test_what_is_no_name_of_a_model_is_left_as_a_path(cache: Path, model: str) -> None:
    """The error for a missing folder follows where it is read."""
    assert local_target(section(model)).model == Path(model)


@pytest.mark.parametrize("revision", ["../../etc", "a b", "-x", "", "x" * 300])
def test_a_revision_is_a_name(revision: str) -> None:
    with pytest.raises(ConfigError, match="a revision is a branch, a tag or a commit"):
        section(revision=revision)


def test_only_files_that_a_target_needs_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No code, no pickle, no second copy of the weights in another format."""
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"]
    others = ["modeling_x.py", "pytorch_model.bin", "original/consolidated.00.pth", "README.md"]
    others += ["onnx/config.json", "consolidated.safetensors", "model.gguf"]
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_target(section(revision="v1")).revision == COMMIT
    assert (asked["name"], asked["revision"]) == (NAME, "v1")
    kept = huggingface_hub.utils.filter_repo_objects(
        files + others,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == files


def answer(status: int) -> httpx2.Response:
    request = httpx2.Request("GET", "https://hub.example/api", headers={"authorization": f"Bearer {SECRET}"})
    return httpx2.Response(status, request=request)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.GatedRepoError(f"403 {SECRET}", response=answer(403)), "accepted its terms"),
        (errors.RepositoryNotFoundError(f"401 {SECRET}", response=answer(401)), "neither a folder wind/tiny"),
        (errors.RevisionNotFoundError(f"404 {SECRET}", response=answer(404)), "no such revision"),
        (errors.HfHubHTTPError(f"401 {SECRET}", response=answer(401)), "answered 401"),
        (errors.HfHubHTTPError(f"500 {SECRET}", response=answer(500)), "answered 500"),
        (errors.LocalEntryNotFoundError(SECRET), "not whole in the hub's local cache"),
        (errors.HFValidationError(SECRET), "no name of a model"),
        (httpx2.ProxyError(SECRET), "the download failed .ProxyError"),
        (OSError(28, SECRET), "the download failed .OSError"),
    ],
)
def test_what_cannot_be_fetched_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    """With the model's name and advice, and without what the hub said, which may hold a token."""

    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=reason) as caught:
        local_target(section())
    assert NAME in caught.value.what
    assert caught.value.next
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_model_that_is_not_cached_is_refused_without_a_network(cache: Path) -> None:
    """As the hub's own client says it."""
    with pytest.raises(ConfigError, match="not whole in the hub's local cache"):
        local_target(section("wind/another"))
