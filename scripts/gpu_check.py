"""Three minutes on a GPU: everything a run does there, against the same on the CPU, and where a step waits.

    python scripts/gpu_check.py [--device cuda:0] [--model FOLDER]

For the methods eagle3, p-eagle and dflash, whose attention is a kernel that Triton compiles:

1. The target captures the same known tokens on the device and on the CPU: states are equal within rounding.
2. The draft's loss and gradients of those samples, in float32, are those of the CPU within rounding.
3. A run captures and trains on the device, keeps checkpoints, and its draft is evaluated there. That of
   eagle3 is `paceline train`; it is killed with all its processes after a checkpoint, too, and resumes to the
   weights of a run that was left alone, bit for bit.
4. A training step is timed: tokens/s, its parts, and the operations that make the host wait.

Exit code 1 and the reason if anything is not so. With `--device cpu` it checks itself on a tiny target.
It was written where there was no GPU: on CUDA it has not run yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paceline.c_compiler import missing_for_triton
from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.errors import PacelineError
from paceline.methods.dflash.attention import KERNEL_HEAD_DIM
from paceline.methods.method import DraftMethod
from paceline.methods.table import METHODS
from paceline.roles.evaluator import evaluate
from paceline.target.head import TargetHead
from paceline.testing.small_run import same_bits
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import WORDS, TinyRun
from paceline.training.determinism import compute_deterministically
from paceline.training.optimizer import build_optimizer
from paceline.training.settings import TrainingSection

CPU = torch.device("cpu")
RELATIVE_ERROR = 2e-3  # of float32 products in another order, over all layers; TF32 is off
FIRST_CHECKPOINT_S = 120
BLOCK_SIZE = 8
Sample = Mapping[str, torch.Tensor]


class MismatchError(Exception):
    """What is not as it should be, in one sentence."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise MismatchError(what)
    print(f"ok    {what}")


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference relative to the largest value."""
    left, right = left.to(CPU).float(), right.to(CPU).float()
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-12))


def captured(
    engine: TransformersEngine, method: DraftMethod, answers: Sequence[tuple[int, ...]]
) -> list[Sample]:
    """Prompts that the engine answers, or, given whole texts, the states of exactly those."""
    features = method.features(engine.facts)
    if answers:
        group = [CaptureRequest(f"s{i}", ids, ((4, len(ids)),)) for i, ids in enumerate(answers)]
    else:
        prompts = [" ".join(WORDS[: 3 + n]) for n in range(8)]
        group = [CaptureRequest(f"s{i}", engine.encode(text), (), 24) for i, text in enumerate(prompts)]
    return [sample.tensors for sample in engine.capture(group, features)]


def check_capture(model: Path, method: DraftMethod, device: str) -> list[Sample]:
    """The samples as the CPU captures them."""
    there = TransformersEngine(model, dtype="float32", device=device)
    there.probe()
    texts = [tuple(s["input_ids"].tolist()) for s in captured(there, method, ())]
    on_device = captured(there, method, texts)
    on_cpu = captured(TransformersEngine(model, dtype="float32", device="cpu"), method, texts)
    for name in ("aux_hidden_states", "last_hidden_states"):
        worst = max(difference(a[name], b[name]) for a, b in zip(on_device, on_cpu, strict=True))
        finite = all(bool(torch.isfinite(sample[name]).all()) for sample in on_device)
        expect(finite and worst < RELATIVE_ERROR, f"captured {name} differ from the CPU's by {worst:.1e}")
    return on_cpu


def check_loss(
    head: TargetHead, method: DraftMethod, samples: Sequence[Sample], device: torch.device
) -> None:
    found = []
    for where in (device, CPU):
        draft = method.build(head, samples, seed=0).to(where)
        sums = draft(method.collate(samples, where))
        sums.loss_sum.backward()
        found.append({"loss": sums.loss_sum.detach(), **{n: p.grad for n, p in draft.named_parameters()}})
    there, here = found
    worst = max(difference(there[name], here[name]) for name in here)
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in there.values())
    expect(finite and worst < RELATIVE_ERROR, f"loss and gradients differ from the CPU's by {worst:.1e}")


def sections_of(vocabulary: int, layers: int) -> dict[str, dict[str, Any]]:
    """The methods that are checked, each with its section for a target of so many layers."""
    tokens = {"draft_vocab_size": vocabulary, "init": "random"}
    blocks = {"block_size": BLOCK_SIZE, "target_states": min(5, layers - 3)}
    return {"eagle3": tokens, "p-eagle": tokens, "dflash": blocks}


def new_run(folder: Path, model: Path, device: str, section: Mapping[str, Any]) -> TinyRun:
    where = {"device": device}
    run = TinyRun(folder, model, engine=where, training=where, evaluation=where, features={"budget_mib": 256})
    run.config["method"] = {"first_samples": 8, "dtype": "float32", **section}
    run.write()
    return run


def check_killed_run(folder: Path, model: Path, device: str, section: Mapping[str, Any]) -> None:
    """Run the command, and run it again after a kill."""
    whole, killed = (new_run(folder / name, model, device, section) for name in ("whole", "killed"))
    done = whole.command("train")
    expect(done.returncode == 0, f"a run on {device} ends well{told(done)}")
    check_result(whole, device)
    kill_after_a_checkpoint(killed)
    done = killed.command("train")
    expect(done.returncode == 0, f"a run killed with all its processes resumes{told(done)}")
    expect(same_bits(whole.final_weights(), killed.final_weights()), "to the same weights, bit for bit")


def check_run_here(folder: Path, model: Path, device: str, section: Mapping[str, Any]) -> None:
    """Capture, training and evaluation in this process, which has loaded torch already."""
    run = new_run(folder, model, device, section)
    try:
        run.train_here()
        run.work_here(evaluate)
    except PacelineError as error:
        raise MismatchError(str(error)) from error
    finally:
        run.free()
    check_result(run, device)


def check_result(run: TinyRun, device: str) -> None:
    evaluation = json.loads((run.directory / "evaluation.json").read_text())
    tau = evaluation["acceptance_length"]
    expect(
        evaluation["identical"] > 0 and tau >= 1.0,
        f"the run's draft is evaluated on {device}: acceptance length {tau:.2f}",
    )
    finite = all(bool(torch.isfinite(w).all()) for w in run.final_weights().values() if w.is_floating_point())
    expect(finite, "its weights are finite")


def told(done: subprocess.CompletedProcess[str]) -> str:
    return "" if done.returncode == 0 else f" (exit {done.returncode}):\n{done.stderr}"


def kill_after_a_checkpoint(run: TinyRun) -> None:
    """SIGKILL to the command and its roles as soon as a step later than the first weights is durable."""
    deadline = time.monotonic() + FIRST_CHECKPOINT_S
    checkpoints = run.directory / "checkpoints"
    with run.start("train") as command:
        while command.poll() is None and time.monotonic() < deadline:
            if any(not found.suffix for found in checkpoints.glob("step-0000000[1-9]*")):
                break
            time.sleep(0.01)
        command.kill()  # its roles die with it


def time_step(head: TargetHead, method: DraftMethod, samples: Sequence[Sample], device: torch.device) -> None:
    """Print tokens/s and the share of each part; then name what makes the host wait."""
    draft = method.build(head, samples, seed=0).to(device)
    settings = TrainingSection()
    optimizer = build_optimizer(draft, settings, method.learning_rate_scales())
    parts: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> object:
        began = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        parts[name] = parts.get(name, 0.0) + time.perf_counter() - began
        return result

    def once() -> None:
        batch = timed("collate and copy", lambda: method.collate(samples, device))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            sums = timed("forward", lambda: draft(batch))
        timed("backward", sums.loss_sum.backward)  # type: ignore[attr-defined]
        timed("clip", lambda: nn.utils.clip_grad_norm_(draft.parameters(), 1.0))
        timed("optimizer", optimizer.step)
        optimizer.zero_grad(set_to_none=True)

    once()
    parts.clear()
    steps = 20 if device.type == "cuda" else 3
    for _ in range(steps):
        once()
    total, tokens = sum(parts.values()), steps * sum(len(sample["input_ids"]) - 1 for sample in samples)
    print(f"      step: {tokens / total:,.0f} tokens/s, {total / steps * 1e3:.1f} ms")
    for name, seconds in parts.items():
        print(f"      {seconds / total:6.1%}  {name}")
    waits = waits_of(draft, method, samples, device)
    expect(
        not waits,
        "nothing in forward and backward makes the host wait" + "".join(f"\n      {w}" for w in waits),
    )


def waits_of(
    draft: nn.Module, method: DraftMethod, samples: Sequence[Sample], device: torch.device
) -> list[str]:
    """What CUDA's own debug mode warns of; empty on a CPU, which waits for nothing."""
    if device.type != "cuda":
        return []
    batch = method.collate(samples, device)
    draft(batch).loss_sum.backward()  # what is compiled for float32 is compiled here
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        draft(batch).loss_sum.backward()
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{w.filename}:{w.lineno}: {w.message}" for w in caught})


def check(folder: Path, model: Path, device: torch.device) -> None:
    """Every method, one after the other. Raises MismatchError."""
    head = TargetHead.load(model)
    samples: list[Sample] = []
    features: object = None
    for name, section in sections_of(min(4096, head.vocab_size // 2), head.num_hidden_layers).items():
        parsed = METHODS.find(name).parse({"name": name, **section})
        missing = missing_for_triton() if device.type == "cuda" and parsed.compiles else None
        expect(missing is None, f"{name}" + (f": {missing.what} {missing.mend}" if missing else ""))
        method: DraftMethod = parsed.build()
        if features != method.features(head.facts):
            features, samples = method.features(head.facts), check_capture(model, method, str(device))
        check_loss(head, method, samples, device)
        run = check_killed_run if name == "eagle3" else check_run_here
        run(folder / name, model, str(device), {"name": name, **section})
        time_step(head, method, samples, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--model", type=Path, help="a target's folder; a tiny random one by default")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here. --device cpu checks the script itself.")
        return 1
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products ask for it
    compute_deterministically(torch.get_num_threads())
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="paceline-gpu-") as name:
        folder = Path(name)
        model = arguments.model or make_tiny_folder(folder / "model", head_dim=KERNEL_HEAD_DIM)
        try:
            check(folder, model, device)
        except MismatchError as mismatch:
            print(f"WRONG {mismatch}")
            return 1
    print(f"All is well on {arguments.device}, in {time.monotonic() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
