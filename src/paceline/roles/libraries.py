"""The process that tells what torch and the libraries are like here: `python -m paceline.roles.libraries`."""

from __future__ import annotations

import json
import sys
import warnings
from importlib.metadata import version
from typing import Any

from paceline.roles.question import answer

TOLD = ("torch", "transformers", "tokenizers", "safetensors")


def libraries() -> dict[str, Any]:
    """Versions, the CUDA that torch was built for ("" for none), and the devices that it can use."""
    import torch

    from paceline.precision import cuda_devices

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        devices = cuda_devices()
    import transformers  # noqa: F401 (whether it can be imported)

    return {
        "versions": {name: version(name) for name in TOLD},
        "cuda": torch.version.cuda or torch.version.hip or "",
        "devices": devices,
        "warnings": [str(one.message).strip().partition("\n")[0] for one in said][:3],
    }


if __name__ == "__main__":
    sys.exit(answer(lambda _: json.dumps(libraries())))
