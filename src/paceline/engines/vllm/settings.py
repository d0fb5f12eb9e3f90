"""The run file's `engine` section for vLLM: a server of the user's, or one of the run's own. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from paceline.engines.settings import EngineSection
from paceline.section import Count

# The command sets these itself, or they would make the server another one than the run's.
OWN_ARGUMENTS = (
    *("--model", "--served-model-name", "--tokenizer", "--dtype", "--host", "--port", "--api-key", "--uds"),
    *("--speculative-config", "--kv-transfer-config", "--enable-prefix-caching", "--config"),
    *("--generation-config", "--trust-remote-code"),
)
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0)]


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a server's address is http://HOST:PORT or https://HOST:PORT")
    if parts.username or parts.password or parts.query or parts.fragment or parts.path.strip("/"):
        raise ValueError("an address has no path, no query and no password; name the key's variable instead")
    return text.rstrip("/")


def _arguments(given: tuple[str, ...]) -> tuple[str, ...]:
    for argument in given:
        name = argument.partition("=")[0].replace("_", "-").replace("--no-", "--")
        # The server takes any unambiguous beginning of a name.
        if name.startswith("--") and any(own.startswith(name) for own in OWN_ARGUMENTS):
            raise ValueError(f"{argument.partition('=')[0]} is set by the run itself")
    return given


def _connector(text: str) -> str:
    if not re.fullmatch(r"([A-Za-z_][\w.]*:)?[A-Za-z_]\w*", text):
        raise ValueError("a connector is a class name, or module:class")
    return text


class VllmSection(EngineSection):
    """A vLLM server that writes hidden states to files: `url`, or `managed: true` for one of the run's own.

    The server and the producer share one machine and one user. `auto` as the target's dtype means bfloat16.
    `directory`: where the server writes its files; by default a folder of the run beside its features.
    `api_key_variable` names the environment variable that holds the key of a server of the user's.
    `requests_in_flight`: requests sent at once, over all groups. `timeout_s`: for one request. `patience_s`:
    how long the producer waits for a server that does not answer. `reference: skip` compares no states with
    the model's own forward in this process, even if it fits into memory.

    For a managed server: `program` starts it, with `args` after the run's own; `devices` are the CUDA devices
    that it sees (none: the CPU build); `connector` may be module:class, a replacement for vLLM's own;
    `restarts_max` limits its restarts without an answer between.
    """

    component: ClassVar[str] = "paceline.engines.vllm.engine:VllmEngine"
    changeable: ClassVar[tuple[str, ...]] = (
        *("url", "managed", "devices", "directory", "api_key_variable", "requests_in_flight"),
        *("timeout_s", "patience_s", "restarts_max", "reference"),
    )
    name: Literal["vllm"] = "vllm"
    url: Annotated[str, AfterValidator(_url)] | None = None
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    directory: Path | None = None
    requests_in_flight: Annotated[int, Field(ge=1, le=1024)] = 64
    timeout_s: Seconds = 300.0
    patience_s: Seconds = 1800.0
    reference: Literal["auto", "skip"] = "auto"
    managed: bool = False
    program: Annotated[tuple[str, ...], Field(min_length=1)] = ("vllm", "serve")
    args: Annotated[tuple[str, ...], AfterValidator(_arguments)] = ()
    devices: tuple[Annotated[int, Field(ge=0, le=4096)], ...] = ()
    connector: Annotated[str, AfterValidator(_connector)] = "ExampleHiddenStatesConnector"
    restarts_max: Count = 3

    @model_validator(mode="after")
    def _one_server(self) -> Self:
        if self.managed == (self.url is not None):
            raise ValueError("engine vllm: give either url (a server of yours) or managed: true")
        if self.managed and self.api_key_variable is not None:
            raise ValueError("engine vllm: a managed server has a key of its own; remove api_key_variable")
        return self
