"""Run by a Python with the speculators package: loads an exported folder, and compares every tensor.

python load_with_speculators.py FOLDER RESULT.json
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main(folder: str) -> dict:
    import torch
    from safetensors.torch import load_file
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config = SpeculatorModelConfig.from_pretrained(folder)
    model = SpeculatorModel.from_pretrained(folder)
    written, loaded = load_file(Path(folder) / "model.safetensors"), model.state_dict()
    theirs = {"verifier_lm_head.weight", "verifier_norm.weight"}  # the target's own
    return {
        "version": version("speculators"),
        "config": type(config).__name__,
        "model": type(model).__name__,
        "equal": sum(torch.equal(loaded[name], written[name]) for name in written if name in loaded),
        "written": len(written),
        "unknown": sorted(written.keys() - loaded.keys()),
        "missing": sorted(loaded.keys() - written.keys() - theirs),
        "layers": list(config.eagle_aux_hidden_state_layer_ids),
        "norm_before_residual": bool(config.norm_before_residual),
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(sys.argv[1])))
