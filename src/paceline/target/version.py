"""The version of a target: digests of its weights, configuration and tokenizer. No torch.

Tensors outside the repeated layers are digested whole. Tensors in those layers would cost minutes at every
start with a large target, so only pieces spread over each of them are digested: a fine-tune changes some of
the pieces, a copy changes none, and an edit of a few rows may pass.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from paceline.errors import ConfigError
from paceline.target.folder import read_config

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
MANIFEST = "manifest.json"  # of a checkpoint
PIECES, PIECE_BYTES = 16, 4096
HEADER_BYTES_MAX = 100_000_000  # the format's own limit
CHUNK_BYTES = 8 << 20
_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True)
class TargetVersion:
    """Digests of 16 hexadecimal digits; equal for any copy of the folder, whatever its path."""

    model: str
    tokenizer: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def of(cls, folder: Path) -> TargetVersion:
        """Raises ConfigError if the folder's files cannot be read."""
        return cls(model_version(folder), tokenizer_version(folder))


def tokenizer_version(folder: Path) -> str:
    digest = xxhash.xxh3_64()
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in (*(folder / name for name in TOKENIZER_FILES), *templates):
        _add_file(digest, path)
    return digest.hexdigest()


def model_version(folder: Path) -> str:
    read_config(folder)  # raises if it is not a text decoder's
    return files_version(folder)


def files_version(folder: Path) -> str:
    """The digest of any model folder's configuration and weights; of a draft's checkpoint, that of its
    manifest, which holds the digests of its files. Raises ConfigError if it is neither."""
    if not (folder / "config.json").is_file() and (folder / MANIFEST).is_file():
        digest = xxhash.xxh3_64()
        _add_file(digest, folder / MANIFEST)
        return digest.hexdigest()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"There is no model in {folder} (no config.json).",
            why="Weights and sizes are read from the files of a local model folder.",
            next="set the path to a model's folder.",
        )
    digest = xxhash.xxh3_64()
    for name in CONFIG_FILES:
        _add_file(digest, folder / name)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            if not path.is_file():
                raise ValueError("it is not a regular file")
            with path.open("rb") as file:
                _add_tensors(digest, path, file)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is not a whole safetensors file ({error or type(error).__name__}).",
                why="A model's version is a digest of its weights, and all of them are needed.",
                next="move the folder away and fetch the model again (`make model` for the recipe's target).",
            ) from error
    return digest.hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    try:
        content = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}).",
            why="The target's version is a digest of its files.",
            next="make it readable, or set target.model to another folder.",
        ) from error
    if content is not None:
        digest.update(json.dumps([path.name, len(content)]).encode() + content)


def _add_tensors(digest: Any, path: Path, file: BinaryIO) -> None:
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(HEADER_BYTES_MAX, size - 8):
        raise ValueError(f"incomplete: a header of {length} bytes in a file of {size}")
    header = file.read(length)
    digest.update(json.dumps([path.name, size]).encode() + header)
    entries: dict[str, Any] = json.loads(header)
    entries.pop("__metadata__", None)
    data = 8 + length
    if max((entry["data_offsets"][1] for entry in entries.values()), default=0) != size - data:
        raise ValueError("incomplete: its tensors end elsewhere than the file")
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if not _IN_A_LAYER.search(name) or end - begin <= PIECES * PIECE_BYTES:
            _add_range(digest, file, data + begin, end - begin)
            continue
        stride = (end - begin - PIECE_BYTES) / (PIECES - 1)
        for piece in range(PIECES):
            _add_range(digest, file, data + begin + int(piece * stride), PIECE_BYTES)


def _add_range(digest: Any, file: BinaryIO, start: int, size: int) -> None:
    file.seek(start)
    while size > 0:
        chunk = file.read(min(size, CHUNK_BYTES))
        if not chunk:
            raise ValueError("incomplete")
        digest.update(chunk)
        size -= len(chunk)
