"""Addresses of a ledger's server: mistakes are named, secrets are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.config.load import flat, given_sections, load_run_config, parse_run_config, recorded_config
from paceline.errors import ConfigError
from paceline.ledger import server_url
from paceline.ledger.settings import RedisSection

URL = "rediss://ali:open%2Fsesame@cave:6380/2"


def run_file(**ledger: str) -> dict[str, dict[str, str]]:
    return {
        "run": {"name": "r", "directory": "runs/r"},
        "target": {"model": "models/m"},
        "prompts": {"path": "p.jsonl"},
        "evaluation": {"prompts": "h.jsonl"},
        "ledger": {"store": "redis", **ledger},
    }


def test_what_a_run_records_and_shows_has_neither_user_nor_password(tmp_path: Path) -> None:
    """Its facts, the run file that a verb writes from them, its messages; the process itself has them."""
    config = parse_run_config(run_file(url=URL), source="run.yaml")
    section = config.ledger
    assert isinstance(section, RedisSection)
    assert section.url == URL
    shown = [repr(config), str(section), str(flat(config)), str(section.told())]
    shown += [section.where(tmp_path, "r"), section.advice(tmp_path), recorded_config(flat(config), tmp_path)]
    assert not [text for text in shown if "sesame" in text or "ali" in text]
    assert flat(config)["ledger.url"] == "rediss://cave:6380/2"
    parse_run_config(given_sections(config), source="a comparison's variant")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://ali:sesame@cave", "redis://HOST:PORT/DATABASE"),
        ("redis://ali:sesame@cave/3?db=2", "names its database once"),
        ("redis://ali:ses/ame@cave", "as %2F"),
        ("redis://ali:sesame@cave/zero", "a database is a number"),
        ("redis://cave?password=sesame", "the options of an address are db, ssl_ca_certs"),
        ("redis://ali:sesame@cave?ssl_cert_reqs=none", "the options of an address are"),
        ("unix://sesame", "unix:///PATH"),
    ],
)
def test_a_wrong_address_is_named_and_not_shown(url: str, message: str) -> None:
    """The message for a mistake shows what was given, but not a password."""
    with pytest.raises(ConfigError, match=message) as caught:
        parse_run_config(run_file(url=url), source="run.yaml")
    assert "ali" not in str(caught.value)
    assert not url.startswith("redis://ali") or "sesame" not in str(caught.value)


def test_a_run_file_that_is_no_yaml_shows_no_password(tmp_path: Path) -> None:
    """The parser quotes the line on which it gave up."""
    path = tmp_path / "run.yaml"
    path.write_text(f"ledger: {{store: redis, url: {URL}: }}: ]\n")
    with pytest.raises(ConfigError, match="not a valid run file") as caught:
        load_run_config(path)
    assert "sesame" not in str(caught.value)


def test_the_environment_names_the_server_or_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run file counts first; a user and a password are given to no server but their own."""
    monkeypatch.delenv(server_url.IN_ENVIRONMENT, raising=False)
    with pytest.raises(ConfigError, match=r"nothing says on which.*PACELINE_REDIS_URL"):
        server_url.complete(None)
    monkeypatch.setenv(server_url.IN_ENVIRONMENT, URL)
    assert server_url.complete(None) == URL
    assert server_url.complete("rediss://cave:6380/2") == URL
    assert server_url.complete("rediss://cave:6380/3") == "rediss://cave:6380/3"
    monkeypatch.setenv(server_url.IN_ENVIRONMENT, "sesame")
    with pytest.raises(ConfigError, match="PACELINE_REDIS_URL in the environment is no address") as caught:
        server_url.complete(None)
    assert "sesame" not in str(caught.value)
