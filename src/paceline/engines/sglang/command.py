"""The command that starts an SGLang server which captures the layers of a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from paceline.engines.sglang.settings import SglangSection
from paceline.engines.sglang.sink import FOLDER_VARIABLE
from paceline.errors import ConfigError
from paceline.target.facts import TargetFacts
from paceline.target.layer_ids import LAYER_IDS
from paceline.types import Feature, layers_of

METHOD = "EAGLE3"  # names how the layers are numbered, and no draft


def aux_layers(
    section: SglangSection, features: Sequence[Feature], num_hidden_layers: int
) -> tuple[int, ...]:
    """The layers that the server itself captures: those of the features but the last.

    Raises ConfigError if the features need the last one and the server has no plug-in that gives it.
    """
    asked = layers_of(features)
    if num_hidden_layers in asked and section.directory is None:
        raise ConfigError(
            f"The method needs the state after the last block ({num_hidden_layers}), which SGLang's own "
            "answers do not hold beside those of other layers.",
            why="Alone SGLang returns it only after the final norm, which is another state.",
            next="set engine.directory and start the server with Paceline's plug-in (docs/sglang.md), or use "
            "engine: {name: vllm} or {name: transformers}.",
        )
    return tuple(sorted(asked - {num_hidden_layers})) or (num_hidden_layers - 1,)


def layer_ids(layers: Sequence[int], num_hidden_layers: int) -> list[int]:
    """SGLang's numbers. Raises ConfigError for layers that it cannot name."""
    return LAYER_IDS["sglang.eagle3"].written(layers, num_hidden_layers)


def sglang_command(
    section: SglangSection, model: Path, facts: TargetFacts, features: Sequence[Feature]
) -> str:
    """The command as a shell reads it. Raises ConfigError.

    Cached tokens have no states, so nothing is cached. The plug-in takes the last state from the forward of
    the model itself, so a prefill with it is not replayed from a graph.
    """
    ids = layer_ids(aux_layers(section, features, facts.num_hidden_layers), facts.num_hidden_layers)
    url = urlsplit(section.url)
    command = [
        *("python", "-m", "sglang.launch_server", "--model-path", str(model.absolute())),
        *("--dtype", facts.dtype, "--host", url.hostname or "127.0.0.1", "--port", str(url.port or 80)),
        *("--enable-return-aux-hidden-states", "--speculative-algorithm", METHOD),
        *("--return-aux-hidden-state-layer-ids", *map(str, ids)),
        *("--disable-radix-cache", "--chunked-prefill-size", "-1"),
        *(["--disable-prefill-cuda-graph"] if section.directory else []),
    ]
    key = ["--api-key", f'"${section.api_key_variable}"'] if section.api_key_variable else []
    folder = section.directory
    variables = [f"{FOLDER_VARIABLE}={shlex.quote(str(folder.absolute()))}"] if folder else []
    return " ".join([*variables, shlex.join(command), *key])
