"""Whether the engine's server answers, or can be started on this host. No torch."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.engines.served.http import Http, NoAnswerError, TryAgainError, key_of
from paceline.engines.served.settings import ServedSection
from paceline.engines.vllm.settings import VllmSection
from paceline.roles.examined import Examined

SERVER_S = 5.0
PROGRAM_S = 90.0  # its libraries are imported first
VLLM_FLOOR = (0, 18)


def ports_can_be_opened(config: RunConfig | None) -> Iterator[Examined]:
    """A managed server listens on a free port of this host; a server of the user's must answer."""
    engine = None if config is None else config.engine
    if isinstance(engine, ServedSection) and engine.url is not None:
        yield from _the_server_answers(engine, engine.url)
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
    yield Examined(topic="ports", state="good", what=f"127.0.0.1 has free ones, such as {number}")


def _the_server_answers(engine: ServedSection, url: str) -> Iterator[Examined]:
    http = Http(url, key_of(engine.api_key_variable))
    try:
        http.check_health()
        status, body = http.exchange("GET", "/version", None, SERVER_S)
    except (NoAnswerError, TryAgainError) as error:
        yield Examined(
            topic="server",
            state="bad",
            what=f"{url} does not answer: {error}",
            mend=f"Start it with the command that `paceline engine {engine.name} RUN.yaml` prints.",
        )
        return
    try:
        number = str(json.loads(body)["version"]) if status == 200 else "of an unknown version"
    except (ValueError, LookupError, TypeError):
        number = "of an unknown version"
    yield from _of_version(engine, f"{url} answers", number)


def _of_version(engine: ServedSection, what: str, number: str) -> Iterator[Examined]:
    parts = tuple(int(part) for part in number.split(".")[:2] if part.isdecimal())
    if isinstance(engine, VllmSection) and len(parts) == 2 and parts < VLLM_FLOOR:
        yield Examined(
            topic="server",
            state="bad",
            what=f"{what}; vLLM {number} has no extract_hidden_states",
            mend="Upgrade it: vLLM 0.18 or newer.",
        )
    else:
        yield Examined(topic="server", state="good", what=f"{what}, {engine.name} {number}")


def the_servers_program_starts(config: RunConfig | None) -> Iterator[Examined]:
    """Ask vLLM's own program for its version. That there is one, the plan looks."""
    engine = None if config is None else config.engine
    if not isinstance(engine, VllmSection) or not engine.managed:
        return
    program = shutil.which(engine.program[0])
    if program is None or Path(program).name != "vllm":
        return
    told = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=PROGRAM_S, check=False
    )
    number = told.stdout.strip().rpartition("\n")[2].split()[-1:]
    if told.returncode or not number:
        yield Examined(
            topic="server",
            state="bad",
            what=f"{program} --version ended with {told.returncode}",
            mend="Repair the installation of vLLM: `vllm --version` shows its error.",
        )
    else:
        yield from _of_version(engine, program, number[0])
