"""The identity of a target: a digest of what its folder holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

VERSION_BYTES = 4096  # read from the middle of every tensor


def model_version(model_folder: Path) -> str:
    """Digest of config.json and of every weight file's size, header and a piece of every tensor.

    The header names every tensor with its shape and place, the same for a model and its fine-tunes;
    the pieces tell those apart. All bytes of a large target would cost minutes at every start.
    """
    digest = hashlib.sha256((model_folder / "config.json").read_bytes())
    for path in sorted(model_folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(json.dumps([path.name, path.stat().st_size]).encode() + header)
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            for begin, end in sorted(entry["data_offsets"] for entry in entries.values()):
                size = min(VERSION_BYTES, end - begin)
                file.seek(8 + len(header) + (begin + end - size) // 2)
                digest.update(file.read(size))
    return digest.hexdigest()[:16]
