"""Quantises a target's projections to int8, as checkpoints of compressed-tensors (W8A8) have them.

    python scripts/quantise_target.py MODEL FOLDER [--rounded FOLDER]

Weights are rounded to the nearest of 255 steps of their row, without calibration; activations are quantised
by the server, token by token. Embedding, norms and lm_head stay as they are. `--rounded` also writes the same
rounded numbers as plain weights, which any engine runs. For tests of quantised targets: a recipe for quality
it is not.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STEPS = 127
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in] and scales float32 [out, 1] of a weight [out, in]."""
    exact = weight.float()
    scale = exact.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / STEPS
    return (exact / scale).round().clamp(-STEPS, STEPS).to(torch.int8), scale


def write(folder: Path, model: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and ".safetensors" not in path.name and path.name != "config.json":
            shutil.copy(path, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def quantise(model: Path, folder: Path, rounded: Path | None = None) -> None:
    config = json.loads((model / "config.json").read_text())
    plain: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        plain |= load_file(path)
    coded = dict(plain)
    for name, weight in plain.items():
        if name.endswith("_proj.weight"):
            codes, scale = quantised(weight)
            coded |= {name: codes, f"{name}_scale": scale}
            plain[name] = (codes.float() * scale).to(weight.dtype)
    write(folder, model, coded, {**config, "quantization_config": QUANTISATION})
    if rounded is not None:
        write(rounded, model, plain, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a folder with plain weights")
    parser.add_argument("folder", type=Path, help="where the quantised one is written")
    parser.add_argument("--rounded", type=Path, help="where the rounded numbers are written as plain weights")
    given = parser.parse_args()
    quantise(given.model, given.folder, given.rounded)


if __name__ == "__main__":
    main()
