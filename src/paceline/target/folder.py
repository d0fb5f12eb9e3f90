"""Reads a Hugging Face model folder: its JSON files and its named tensors; every failure is our error.

It reads safetensors only, follows no path out of the folder and runs none of its code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError

if TYPE_CHECKING:
    import torch

JSON_BYTES_MAX = 256 << 20
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_NO_TOKEN = -1  # as some configurations say it
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError if it cannot be read or is something else."""
    try:
        if path.stat().st_size > JSON_BYTES_MAX or not path.is_file():
            raise ValueError("it is not a regular file of a sensible size")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}, not an object")
    return content


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({reason}).",
        why="Everything about the target follows from the files of its folder.",
        next="fetch the model again (`make model` for the recipe's target), or set target.model to a "
        "complete Hugging Face model folder.",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the settings of a vision-language model's text decoder in the place of its own.

    Raises ConfigError if it is missing, damaged, or not that of a text decoder.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"There is no model in {folder} (no config.json).",
            why="Target and draft are built from the files of a local model folder.",
            next="run `make model`, or set target.model to a Hugging Face model folder.",
        )
    config = read_json(path)
    if isinstance(text := config.get("text_config"), dict):
        config = {**config, **text, "model_type": config.get("model_type")}
    if not isinstance(config.get("model_type"), str):
        raise _unfit(path, "it has no model_type")
    unfit = [key for key in _SIZES if key in config and not _is_count(config[key])]
    if unfit:
        raise _unfit(path, f"{unfit[0]} is {config[unfit[0]]!r}")
    return config


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _unfit(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} is not the config of a text decoder: {reason}.",
        why="The draft takes its sizes from the target's config.",
        next="set target.model to a causal language model's folder.",
    )


def quantisation(config: Mapping[str, Any]) -> str:
    """How the checkpoint is quantised: its tensors are codes and scales, not weights; "" if it is not."""
    settings = config.get("quantization_config") or config.get("compression_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return str(method or "quantization_config") if settings else ""


def refuse_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a quantised checkpoint, where plain weights are computed with."""
    if method := quantisation(config):
        raise ConfigError(
            f"{folder / 'config.json'} says that the target is quantised ({method}).",
            why="The transformers engine computes with plain weights only, and others give other states.",
            next="set engine.name to an engine that runs it (docs/targets.md), or target.model to the same "
            "model's folder in bfloat16, float16 or float32.",
        )


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, empty if there is none. Raises ConfigError if it is damaged."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def eos_token_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer, for capture, draft vocabulary and evaluation alike.

    Like the library's `generate`: those of generation_config.json, or else those of config.json.
    """
    value = generation_config.get("eos_token_id")
    value = config.get("eos_token_id") if value is None else value
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= _NO_TOKEN for item in values):
        raise ConfigError(
            f"The target's eos_token_id is {value!r}, not a token id or a list of them.",
            why="Answers end with these tokens.",
            next="correct generation_config.json (or config.json) of the target.",
        )
    return tuple(dict.fromkeys(item for item in values if item != _NO_TOKEN))


class TensorFiles:
    """The tensors of a folder by name, in one file or in shards."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if the folder's safetensors cannot be read."""
        self.folder = folder
        if (folder / INDEX).is_file():
            self.shard_of = _weight_map(folder / INDEX)
        elif (folder / WEIGHTS).is_file():
            self.shard_of = dict.fromkeys(self._names(WEIGHTS), WEIGHTS)
        else:
            raise ConfigError(
                f"{folder} has neither {WEIGHTS} nor {INDEX}.",
                why="Only safetensors weights are read; pickled weights can run code.",
                next=f"ls {folder}  # convert the model with save_pretrained(safe_serialization=True)",
            )

    def __contains__(self, name: object) -> bool:
        return name in self.shard_of

    def refuse_missing(self) -> None:
        """Raise ConfigError unless each file is there and holds the tensors that the index says it has."""
        for shard in sorted(set(self.shard_of.values())):
            there = set(self._names(shard))
            missing = [name for name, file in self.shard_of.items() if file == shard and name not in there]
            if missing:
                raise _damaged(self.folder / shard, f"it has no tensor {missing[0]}, which {INDEX} names")

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The named tensors as stored. Raises ConfigError if one is missing or unreadable."""
        missing = [name for name in names if name not in self.shard_of]
        if missing:
            raise ConfigError(
                f"{self.folder} has no tensor named {missing[0]} "
                f"({len(missing)} of {len(names)} names missing).",
                why="The draft reads the target's embedding, final norm and lm_head by their names.",
                next="check that the folder is complete, or use a target of another family",
            )
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted({self.shard_of[name] for name in names}):
            with self._open(shard) as file:
                for name in names:
                    if self.shard_of[name] == shard:
                        tensors[name] = file.get_tensor(name)
        return tensors

    def _names(self, shard: str) -> list[str]:
        with self._open(shard) as file:
            return list(file.keys())

    def _open(self, shard: str) -> Any:
        return _Shard(self.folder / shard)


class _Shard:
    """`safe_open` with every failure turned into a ConfigError that names the file."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._path = path
        with self:
            self._file = safe_open(path, framework="pt")

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        from safetensors import SafetensorError

        if isinstance(error, (SafetensorError, OSError, ValueError, KeyError)):
            raise _damaged(self._path, str(error).partition("\n")[0] or type(error).__name__) from error

    def keys(self) -> list[str]:
        return list(self._file.keys())  # type: ignore[no-untyped-call]

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "it has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise _damaged(path, f"it names {shard!r} as the file of {name}")
    return weight_map
