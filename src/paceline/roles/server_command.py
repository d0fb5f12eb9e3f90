"""Prints the command that starts the server of a run: `python -m paceline.roles.server_command RUN.yaml`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit

from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.engines.served.engine import served_facts
from paceline.engines.sglang.command import sglang_command
from paceline.engines.sglang.settings import SglangSection
from paceline.engines.vllm.command import serve_command, served_layers
from paceline.engines.vllm.server import KEY_VARIABLE, visible_devices
from paceline.engines.vllm.settings import VllmSection
from paceline.errors import explained
from paceline.roles.feature_folder import engine_folder
from paceline.target.hub import local_target
from paceline.terminal import printable
from paceline.visible_devices import DEVICES_VARIABLE

PORT = 8000


def server_command(config: RunConfig) -> str:
    """The command as a shell reads it: variables, program, arguments. Raises ConfigError."""
    section, target = config.engine, local_target(config.target)
    facts = served_facts(target, section.name)
    features = config.method.build().features(facts)
    if isinstance(section, SglangSection):
        return sglang_command(section, target.model, facts, features)
    assert isinstance(section, VllmSection)
    layers = served_layers(features, facts.num_hidden_layers)
    folder = section.directory or engine_folder(config)
    command = serve_command(section, target.model, facts.dtype, layers, facts.num_hidden_layers, folder)
    port = (urlsplit(section.url).port if section.url else None) or PORT
    variables = []
    if section.devices:
        visible = visible_devices(section.devices, os.environ)
        variables.append(f"{DEVICES_VARIABLE}={visible}")
    if section.api_key_variable:
        variables.append(f'{KEY_VARIABLE}="${section.api_key_variable}"')
    return " ".join([*variables, shlex.join([*command, "--port", str(port)])])


def main(run_file: Path) -> int:
    try:
        sys.stdout.write(server_command(load_run_config(run_file)) + "\n")
    except Exception as error:  # noqa: BLE001 (every error is reported)
        told = explained(error)
        sys.stderr.write(printable(f"{told}\n"))
        return told.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
