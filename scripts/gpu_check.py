"""Three minutes on a GPU: everything a run does there, against the same on the CPU, and where a step waits.

    python scripts/gpu_check.py [--device cuda:0] [--model FOLDER]

1. The target captures the same known tokens on the device and on the CPU: states are equal within rounding.
2. The draft's loss and gradients of those samples, in float32, are those of the CPU within rounding.
3. `paceline train` runs on the device, is killed with all its processes after a checkpoint, resumes to the
   weights of a run that was left alone, bit for bit, and is evaluated there.
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

import torch
from torch import nn

from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.methods.eagle3.method import Eagle3Method
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
    engine: TransformersEngine, method: Eagle3Method, answers: Sequence[tuple[int, ...]]
) -> list[Sample]:
    """Prompts that the engine answers, or, given whole texts, the states of exactly those."""
    features = method.features(engine.facts)
    if answers:
        group = [CaptureRequest(f"s{i}", ids, ((4, len(ids)),)) for i, ids in enumerate(answers)]
    else:
        prompts = [" ".join(WORDS[: 3 + n]) for n in range(8)]
        group = [CaptureRequest(f"s{i}", engine.encode(text), (), 24) for i, text in enumerate(prompts)]
    return [sample.tensors for sample in engine.capture(group, features)]


def check_capture(model: Path, method: Eagle3Method, device: str) -> list[Sample]:
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
    head: TargetHead, method: Eagle3Method, samples: Sequence[Sample], device: torch.device
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


def new_run(folder: Path, model: Path, device: str, vocabulary: int) -> TinyRun:
    where = {"device": device}
    return TinyRun(
        folder,
        model,
        engine=where,
        training=where,
        evaluation=where,
        method={"draft_vocab_size": vocabulary},
        features={"budget_mib": 256},
    )


def check_run(folder: Path, model: Path, device: str, vocabulary: int) -> None:
    whole, killed = (new_run(folder / name, model, device, vocabulary) for name in ("whole", "killed"))
    done = whole.command("train")
    expect(done.returncode == 0, f"a run on {device} ends well{told(done)}")
    evaluation = json.loads((whole.directory / "evaluation.json").read_text())
    tau = evaluation["acceptance_length"]
    expect(
        evaluation["identical"] > 0 and tau >= 1.0,
        f"its draft is evaluated on {device}: acceptance length {tau:.2f}",
    )
    finite = all(
        bool(torch.isfinite(w).all()) for w in whole.final_weights().values() if w.is_floating_point()
    )
    expect(finite, "its weights are finite")
    kill_after_a_checkpoint(killed)
    done = killed.command("train")
    expect(done.returncode == 0, f"a run killed with all its processes resumes{told(done)}")
    expect(same_bits(whole.final_weights(), killed.final_weights()), "to the same weights, bit for bit")


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


def time_step(
    head: TargetHead, method: Eagle3Method, samples: Sequence[Sample], device: torch.device
) -> None:
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
    steps = 20
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
    draft: nn.Module, method: Eagle3Method, samples: Sequence[Sample], device: torch.device
) -> list[str]:
    """What CUDA's own debug mode warns of; empty on a CPU, which waits for nothing."""
    if device.type != "cuda":
        return []
    batch = method.collate(samples, device)
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        draft(batch).loss_sum.backward()
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{w.filename}:{w.lineno}: {w.message}" for w in caught})


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
        model = arguments.model or make_tiny_folder(folder / "model")
        head = TargetHead.load(model)
        vocabulary = min(4096, head.vocab_size // 2)
        method = Eagle3Method({"draft_vocab_size": vocabulary, "init": "random"})
        try:
            samples = check_capture(model, method, arguments.device)
            check_loss(head, method, samples, device)
            check_run(folder, model, arguments.device, vocabulary)
            time_step(head, method, samples, device)
        except MismatchError as mismatch:
            print(f"WRONG {mismatch}")
            return 1
    print(f"All is well on {arguments.device}, in {time.monotonic() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
