"""Proves by a real vLLM that a quantised target can be trained for: states, text, run and served draft.

    PYTHONPATH=. python tests/vllm/check_quantised.py --vllm VENV/bin/python [--model FOLDER] [--record FILE]

The target's projections are quantised to int8 (W8A8, compressed-tensors). The transformers engine must refuse
it by name; the server's states must be nearest to those that the same rounded numbers give as plain weights
after the same block; a short run trains, and its exported draft is served. With int8 products plain vLLM may
itself give other answers with more rows at a time (on an AMD EPYC 8 of 12 stay equal), and so may a
verification: the target must judge those answers about as well as its own. Exits with 1 if a comparison
fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from check_exports import EXACTLY, by_vllm, encoded_prompts, equal_answers, figures, length
from check_exports import served as served_of

from benchmarks.record import commit
from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.durable_files import replace_file
from paceline.engines.engine import Captured, CaptureRequest
from paceline.engines.settings import EngineRun
from paceline.engines.transformers import TransformersEngine
from paceline.errors import ConfigError
from paceline.roles.snapshot import open_run, take_snapshot
from paceline.target.head import TargetHead
from paceline.telemetry import read_events
from paceline.types import Feature, States, Tokens
from scripts.quantise_target import quantise

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "smollm2-vllm-cpu.yaml"
PROMPTS, TEXTS, TOKENS, SERVED = 32, 8, 24, 12
BELOW = 2.0  # times what the worst token of plain answers is below the likeliest, judged by a prefill
FLOOR = 1.05  # acceptance length; a draft that has learned nothing reaches 1.0
REFUSAL = "says that the target is quantised (compressed-tensors)"
PROBED = "were not compared with the model's (it is quantised (compressed-tensors)"
EVENT_BYTES = 8 << 20


def run_file_of(folder: Path, target: Path, python: str, engine: dict[str, Any] | None = None) -> Path:
    """The recipe's, shortened, for that target; `engine` instead of the recipe's."""
    recipe = yaml.safe_load(RECIPE.read_text())
    lines = (ROOT / recipe["prompts"]["path"]).read_text().splitlines(keepends=True)
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(lines[:PROMPTS]))
    recipe["prompts"] |= {"path": str(folder / "train.jsonl"), "rounds": 1}
    recipe["run"] |= {"name": "quantised", "directory": str(folder / "run")}
    recipe["target"]["model"] = str(target)
    recipe["engine"] = engine or {**recipe["engine"], "program": [python, "scripts/vllm_cpu/serve.py"]}
    recipe["export"] = {"formats": ["vllm"], "dtype": "float32"}
    recipe["features"]["directory"] = str(folder)  # gone with the rest, whatever a run leaves there
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "run.yaml"


def train(run_file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paceline.cli.main", "train", str(run_file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def refusal_of(folder: Path, target: Path, python: str) -> dict[str, Any]:
    """What the command says where no server runs the target."""
    ended = train(run_file_of(folder, target, python, {"name": "transformers"}))
    said = " ".join(ended.stderr.split())
    return {"code": ended.returncode, "passed": ended.returncode == ConfigError.exit_code and REFUSAL in said}


def states_of(config: RunConfig, rounded: Path, scratch: Path) -> dict[str, Any]:
    """The server's states beside those of the rounded numbers as plain weights, after the same block and its
    neighbours: the mean error of a row. The same block must be the nearest."""
    last = TargetHead.load(rounded).num_hidden_layers
    layers = [2, 15, 27, last]
    features = [Feature("tokens", Tokens(), dtype="int64"), *states_after(layers)]
    run = EngineRun(lambda _: features, scratch / "probe", lambda: scratch / "states")
    (scratch / "states").mkdir(mode=0o700)
    engine = config.engine.build(config.target, run)
    try:
        engine.probe()
        texts = [f"Tell me {number} things about the wind." for number in range(TEXTS)]
        served = engine.capture([CaptureRequest(s, engine.encode(s), (), TOKENS) for s in texts], features)
    finally:
        engine.close()
    around = sorted({near for k in layers for near in (k - 1, k, k + 1) if near <= last})
    known = [CaptureRequest(s.sample_id, tuple(s.tensors["tokens"].tolist())) for s in served]
    plain = TransformersEngine(rounded, dtype="bfloat16").capture(known, states_after(around))
    errors = {
        k: {near: mean_error(served, plain, k, near) for near in around if abs(near - k) <= 1} for k in layers
    }
    return {**errors, "passed": all(min(found, key=found.__getitem__) == k for k, found in errors.items())}


def states_after(layers: Sequence[int]) -> list[Feature]:
    return [Feature(str(k), States((k,)), dtype="bfloat16") for k in layers]


def mean_error(served: Sequence[Captured], plain: Sequence[Captured], layer: int, near: int) -> float:
    one = torch.cat([sample.tensors[str(layer)].float() for sample in served])
    other = torch.cat([sample.tensors[str(near)].float() for sample in plain])
    return round(float(((one - other).norm(dim=1) / other.norm(dim=1)).mean()), 4)


def trained(run_file: Path) -> dict[str, Any]:
    ended = train(run_file)
    sys.stderr.write(ended.stdout + ended.stderr)
    directory = load_run_config(run_file).run.directory
    snapshot = take_snapshot(directory, open_run(directory))
    events = read_events(directory / "events" / "producer.jsonl", tail_bytes=EVENT_BYTES)
    probe = sorted({event["message"] for event in events if event["event"] == "note"})
    checker = [sys.executable, "-m", "paceline.cli.main", "fsck", str(directory)]
    found = {
        "code": ended.returncode,
        "committed": snapshot.ledger.committed,
        "trained": snapshot.ledger.samples_trained,
        "failed": snapshot.ledger.prompts.failed,
        "fsck": subprocess.run(checker, stdout=subprocess.DEVNULL, check=False).returncode,
        "probe": probe,
    }
    counts = [found[name] for name in ("code", "committed", "trained", "failed", "fsck")]
    found["passed"] = counts == [0, PROMPTS, PROMPTS, 0, 0] and any(PROBED in note for note in probe)
    return found


def served(config: RunConfig, python: str, prompts: Any) -> dict[str, Any]:
    """The exported draft in a server of the quantised target, beside plain decoding of that server."""
    folder = config.run.directory / "export" / "vllm"
    theirs = by_vllm(python, config.target.model, prompts, draft=served_of(config, folder), **EXACTLY)
    plain = by_vllm(python, config.target.model, prompts, draft=None, judged=[theirs["answers"]], **EXACTLY)
    of_plain, of_theirs = plain["below"]
    return {
        **figures(theirs),
        "prompts": len(prompts),
        "equal_to_plain_vllm": equal_answers(theirs, plain),
        "worst token below the likeliest, nats": {"plain": of_plain, "speculated": of_theirs},
        "passed": of_theirs <= BELOW * of_plain and length(theirs) >= FLOOR,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", required=True, help="a Python in which vLLM is installed")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--record", type=Path, help="write the figures here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="paceline-quantised-") as name:
        scratch = Path(name)
        target, rounded = scratch / "w8a8", scratch / "rounded"
        quantise(given.model, target, rounded)
        run_file = run_file_of(scratch / "with-vllm", target, given.vllm)
        config = load_run_config(run_file)
        results = {
            "transformers engine": refusal_of(scratch / "without", target, given.vllm),
            "states": states_of(config, rounded, scratch),
            "run": trained(run_file),
        }
        results["draft served in float32"] = served(config, given.vllm, encoded_prompts(config)[:SERVED])
        about = {"date": date.today().isoformat(), "commit": commit(), "target": f"{given.model.name}, W8A8"}
        text = json.dumps({**about, **results}, indent=1)
    sys.stdout.write(text + "\n")
    if given.record:
        replace_file(given.record, (text + "\n").encode())
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
