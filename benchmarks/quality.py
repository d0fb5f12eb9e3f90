"""The floor under the draft's quality: the recipe, much shortened, decoded for real.

    python -m benchmarks.quality [--model FOLDER]

Two to four minutes on two idle cores: the first prompts of recipes/smollm2-cpu.yaml are answered once and
trained in a few passes by the real command, and the draft is measured on held-out prompts. Fails if the
acceptance length lies below the floor. The figures are those of the whole way from prompt to draft token,
so whatever is wrong in between (a shifted mask, a lost term of the loss, a schedule that ends at once)
shows here.
Everything but the shape of the run is the recipe's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import commit, keep

RECIPE = Path("recipes/smollm2-cpu.yaml")
PROMPTS, HELD_OUT, NEW_TOKENS = 128, 12, 32
# A draft that has learned nothing reaches 1.0; the whole recipe 2.00 and 1.66.
# Recorded on 2026-11-28: 1.54 and 1.30. The floors take a quarter off what the draft adds to 1.0.
FLOORS = {"tree": 1.4, "chain": 1.22}


def shortened(recipe: dict[str, Any], folder: Path, model: str | None) -> dict[str, Any]:
    """The recipe with fewer prompts, answered once, in a run folder of its own."""
    data = {name: value for name, value in recipe["data"].items() if name != "sources"}
    lines = Path(recipe["data"]["sources"][0]["path"]).read_text().splitlines(keepends=True)
    prompts = folder / "train.jsonl"
    prompts.write_text("".join(lines[:PROMPTS]))
    changes: dict[str, dict[str, Any]] = {
        "run": {"name": "quality", "directory": str(folder / "run")},
        "target": {"model": model or recipe["target"]["model"]},
        "capture": {"group_size": 64},
        "method": {"first_samples": 64},
        "training": {"passes": 4},
        "evaluation": {"max_prompts": HELD_OUT, "max_new_tokens": NEW_TOKENS},
    }
    changed = {name: {**recipe.get(name, {}), **values} for name, values in changes.items()}
    return {**recipe, **changed, "data": {**data, "path": str(prompts), "rounds": 1}}


def measure(model: str | None) -> dict[str, Any]:
    """Train and evaluate; the report that `paceline train` leaves, and the seconds it took."""
    with tempfile.TemporaryDirectory(prefix="paceline-quality-") as name:
        folder = Path(name)
        run_file = folder / "run.yaml"
        recipe = yaml.safe_load(RECIPE.read_text())
        run_file.write_text(yaml.safe_dump(shortened(recipe, folder, model)))
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "paceline.cli.main", "train", str(run_file)], check=True)
        seconds = time.monotonic() - began
        report: dict[str, Any] = json.loads((folder / "run" / "evaluation.json").read_text())
    return {"seconds": round(seconds, 1), **report}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="the target's folder, if it is not the recipe's")
    report = measure(parser.parse_args().model)
    found = {"tree": report["acceptance_length"], "chain": report["chain"]["acceptance_length"]}
    low = [name for name, floor in FLOORS.items() if found[name] < floor]
    for name, floor in FLOORS.items():
        print(f"acceptance length, {name}: {found[name]:.3f}, floor {floor}")
    if not low:
        print(keep("quality", {"commit": commit(), "floors": FLOORS, **report}))
    else:
        print(f"below the floor: {', '.join(low)}")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
