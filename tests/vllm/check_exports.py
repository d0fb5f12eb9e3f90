"""Proves exported drafts by real vLLM: its counters are those of our own decoder.

    PYTHONPATH=. python tests/vllm/check_exports.py RUN [RUN ...] --vllm VENV/bin/python
        [--dtypes float32 bfloat16] [--speculators PATH] [--record FILE.json]

In float32, twelve held-out prompts, one at a time: the same answers and the same integers by depth, from
every format that vLLM loads of the run's method. In bfloat16, 48 prompts at once: within 0.02 of our
acceptance length, and every answer that of plain decoding in batches as wide. The runs must be finished, with
their targets and prompts in place. The record has one entry a run; those of other runs stay. Exits with 1 if
a comparison fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import commit
from paceline.cli.export import export_request, report_file
from paceline.config.load import load_run_config, recorded_config
from paceline.config.run import RunConfig
from paceline.durable_files import replace_file
from paceline.errors import PacelineError
from paceline.evaluation.speculative import Decoding, speculative_generate
from paceline.evaluation.target import LlamaTarget
from paceline.evaluation.tree import Drafting
from paceline.exports.servers import SPECULATORS, VLLM
from paceline.exports.serving import Served, commands
from paceline.ledger.facts import RENDERING_DATE
from paceline.roles.draft import newest_checkpoint
from paceline.roles.held_out import TemplateOnly, held_out_prompts
from paceline.roles.snapshot import open_run
from paceline.roles.supervisor import export_run
from paceline.target.head import TargetHead
from paceline.target.tokenizer import PromptEncoder
from paceline.training import tensor_files
from paceline.training.learner import DRAFT

HERE = Path(__file__).parent
CHAIN, TOKENS = 3, 64  # a block is guessed whole, however long it is
EXACT, MANY = 12, 48  # prompts
EXACTLY: dict[str, Any] = {"dtype": "float32", "rows": 1}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOADED = {"vllm": VLLM, "speculators": SPECULATORS}  # by vLLM
AL_MAX = 0.02
Result = dict[str, Any]


def own(config: RunConfig, dtype: str, prompts: Sequence[tuple[int, ...]]) -> Result:
    """Answers and counters of our own decoder, with the weights as they were exported."""
    view = config.view_ledger()
    checkpoint = newest_checkpoint(config, view, only=(DRAFT,))
    method, head = config.method.build(), TargetHead.load(config.target.model)
    stored = tensor_files.from_bytes(DRAFT, checkpoint.files[DRAFT])
    drafter = method.drafter(method.restore(head, stored), DTYPES[dtype])
    target = LlamaTarget(head, drafter.layers, DTYPES[dtype])
    decoding = Decoding(max_new_tokens=TOKENS, eos_token_ids=head.eos_token_ids)
    chain = method.chain_length(CHAIN)
    decoded = [speculative_generate(target, drafter, ids, decoding, Drafting(chain)) for ids in prompts]
    kept = [count for answer in decoded for count in answer.accepted]
    return {
        "answers": [answer.tokens for answer in decoded],
        "cycles": len(kept),
        "kept": [sum(count > depth for count in kept) for depth in range(chain)],
    }


def by_vllm(
    python: str,
    model: Path,
    prompts: Sequence[tuple[int, ...]],
    *,
    draft: Served | None,
    **request: Any,
) -> Result:
    """Answers and counters of vLLM, told to draft as `paceline serve` tells it; None: plain decoding."""
    asked: Result = {"model": str(model.absolute()), "prompts": [list(ids) for ids in prompts]}
    speculation = None
    if draft is not None:
        [command] = commands("vllm", draft).values()
        speculation = json.loads(command[command.index("--speculative-config") + 1])
    asked |= {"speculation": speculation, "max_tokens": TOKENS}
    return other_python(python, "decode_with_vllm.py", {**asked, **request})


def other_python(python: str, script: str, request: Result | str, path: str = "") -> Result:
    """What a script of this folder writes when another Python runs it."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "request.json"), Path(folder, "result.json")
        given.write_text(json.dumps(request))
        argument = request if isinstance(request, str) else str(given)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(
            [python, str(HERE / script), argument, str(result)],
            env=environment,
            check=True,
            stdout=sys.stderr,
        )
        found: Result = json.loads(result.read_text())
        return found


def length(result: Result) -> float:
    """1 + kept guesses a cycle."""
    return 1 + sum(result["kept"]) / max(1, result["cycles"])


def figures(result: Result) -> Result:
    return {"cycles": result["cycles"], "kept": result["kept"], "acceptance_length": round(length(result), 4)}


def equal_answers(one: Result, other: Result) -> int:
    return sum(a == b for a, b in zip(one["answers"], other["answers"], strict=True))


def served(config: RunConfig, folder: Path) -> Served:
    """The run's draft in that folder, as `paceline export` notes it."""
    method = config.method.build()
    return Served(str(config.target.model), str(folder), method.name, method.chain_length(CHAIN))


def exactly(config: RunConfig, python: str, folders: dict[str, Path], prompts: Any) -> Result:
    chosen = prompts[:EXACT]
    ours = own(config, "float32", chosen)
    found: Result = {"prompts": len(chosen), "paceline": figures(ours)}
    for name, folder in folders.items():
        theirs = by_vllm(python, config.target.model, chosen, draft=served(config, folder), **EXACTLY)
        found[name] = {**figures(theirs), "equal_answers": equal_answers(ours, theirs)}
        same = found[name]["cycles"] == ours["cycles"] and found[name]["kept"] == ours["kept"]
        found[name]["passed"] = same and found[name]["equal_answers"] == len(chosen)
        found["versions"] = theirs["versions"]
    return {**found, "passed": all(found[name]["passed"] for name in folders)}


def nearly(config: RunConfig, python: str, folder: Path, prompts: Any) -> Result:
    chosen = prompts[:MANY]
    ours = own(config, "bfloat16", chosen)
    shared: Result = {"dtype": "bfloat16", "rows": len(chosen)}
    theirs = by_vllm(python, config.target.model, chosen, draft=served(config, folder), **shared)
    plain = by_vllm(python, config.target.model, chosen, draft=None, **shared)
    lossless = equal_answers(theirs, plain)
    return {
        "prompts": len(chosen),
        "versions": theirs["versions"],
        "paceline": figures(ours),
        "vllm": figures(theirs),
        "equal_to_plain_vllm": lossless,
        "passed": abs(length(theirs) - length(ours)) <= AL_MAX and lossless == len(chosen),
    }


def by_speculators(python: str, folder: Path, path: str) -> Result:
    found = other_python(python, "load_with_speculators.py", str(folder), path)
    whole = found["equal"] == found["written"] and not found["unknown"] and not found["missing"]
    return {**found, "passed": whole and not found["norm_before_residual"]}


def export(
    run_file: Path, config: RunConfig, formats: list[str], folder: Path, dtype: str
) -> dict[str, Path]:
    request = export_request(config, formats, folder, dtype=dtype)
    if not export_run(run_file, config, request, report_file(config)):
        raise SystemExit("stopped")
    return request.folders(config.run.directory)


def run_config(directory: Path, folder: Path) -> tuple[Path, RunConfig]:
    run_file = folder / "run.yaml"
    run_file.write_text(recorded_config(open_run(directory).facts().get("config", {}), directory))
    return run_file, load_run_config(run_file)


def encoded_prompts(config: RunConfig) -> tuple[tuple[int, ...], ...]:
    """Of the held-out file, as many as are asked for here."""
    wide = config.evaluation.model_copy(update={"max_prompts": MANY, "max_new_tokens": TOKENS})
    config = config.model_copy(update={"evaluation": wide})
    head = TargetHead.load(config.target.model)
    view = config.view_ledger()
    encoder = PromptEncoder.of(config.target, date=view.facts().get(RENDERING_DATE))
    target = TemplateOnly(encoder, config.target.model)
    positions = head.config.get("max_position_embeddings")
    return held_out_prompts(config, target, head.vocab_size, positions).prompts


def compared(given: argparse.Namespace, directory: Path, scratch: Path) -> Result:
    """Every comparison of one run's draft that was asked for."""
    run_file, config = run_config(directory, scratch)
    formats = [name for name, server in LOADED.items() if config.method.name in server.layouts]
    prompts = encoded_prompts(config)
    found: Result = {"date": datetime.now(UTC).date().isoformat(), "commit": commit()}
    found["method"] = config.method.name
    found["samples_trained"] = open_run(config.run.directory).snapshot().samples_trained
    if "float32" in given.dtypes:
        folders = export(run_file, config, formats, scratch / "fp32", "fp32")
        found["float32"] = exactly(config, given.vllm, folders, prompts)
        if given.speculators is not None and "speculators" in folders:
            found["speculators"] = by_speculators(given.vllm, folders["speculators"], given.speculators)
    if "bfloat16" in given.dtypes:
        flat = export(run_file, config, ["vllm"], scratch / "bf16", "bf16")["vllm"]
        found["bfloat16"] = nearly(config, given.vllm, flat, prompts)
    return {config.run.name: found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the directory of a finished run")
    parser.add_argument("--vllm", required=True, help="a Python in which vLLM is installed")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--speculators", help="a folder to add to its path, with the speculators package")
    parser.add_argument("--record", type=Path, help="write the figures here")
    given = parser.parse_args()
    failed = False
    for directory in given.runs:
        with tempfile.TemporaryDirectory() as scratch:
            entry = compared(given, directory, Path(scratch))
        sys.stdout.write(json.dumps(entry, indent=1) + "\n")
        if given.record:
            kept = json.loads(given.record.read_text()) if given.record.exists() else {}
            replace_file(given.record, (json.dumps({**kept, **entry}, indent=1) + "\n").encode())
        [found] = entry.values()
        failed |= not all(part["passed"] for part in found.values() if isinstance(part, dict))
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PacelineError as error:
        sys.exit(str(error))
