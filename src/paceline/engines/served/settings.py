"""What the run file's sections of engines with a server have in common. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from paceline.engines.settings import EngineSection

Seconds = Annotated[float, Field(gt=0.0, le=86_400.0)]


def server_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a server's address is http://HOST:PORT or https://HOST:PORT")
    if parts.username or parts.password or parts.query or parts.fragment or parts.path.strip("/"):
        raise ValueError("an address has no path, no query and no password; name the key's variable instead")
    return text.rstrip("/")


class ServedSection(EngineSection):
    """A server at `url` that runs the target.

    `api_key_variable` names the environment variable that holds the key of a server of the user's.
    `directory`: where the server writes its files of states.
    `requests_in_flight`: requests sent at once, over all groups. `timeout_s`: for one request. `patience_s`:
    how long the producer waits for a server that does not answer. `reference: skip` compares no states with
    the model's own forward in this process, even if it fits into memory.
    """

    changeable: ClassVar[tuple[str, ...]] = (
        *("url", "directory", "api_key_variable", "requests_in_flight"),
        *("timeout_s", "patience_s", "reference"),
    )
    url: Annotated[str, AfterValidator(server_url)] | None = None
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    directory: Path | None = None
    requests_in_flight: Annotated[int, Field(ge=1, le=1024)] = 64
    timeout_s: Seconds = 300.0
    patience_s: Seconds = 1800.0
    reference: Literal["auto", "skip"] = "auto"
