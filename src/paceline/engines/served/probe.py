"""What is compared before a server's states and texts are believed.

Three things: the states after every layer with the model's own forward in this process, where the model fits
into memory; the written tokens with the distribution that the draft learns, which is made of the captured
last states (a broken sampler writes gibberish whose states are right); and the server's own log probabilities
with that distribution. A server that was away is compared with what it gave before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.engines.engine import Captured, CaptureRequest
from paceline.engines.probe import TOKENS, Bounds, Plain, compare
from paceline.engines.served.likelihood import implausible, mean_difference
from paceline.errors import CaptureMismatchError
from paceline.target.folder import quantisation, read_config
from paceline.target.head import OutputLayer

GREEDY_TEXTS = (
    "The wind turns.",
    "The wind turns a wheel, and every rider in line follows until one lets go.",
    "Who leads?",
)
SAMPLED_TEXTS = ("Tell me about the wind.", "Why do riders ride in line?", "Write a short story.", "Hello!")
GREEDY_TOKENS, SAMPLED_TOKENS, TEMPERATURE = 8, 32, 0.8
LOGPROB_BOUND = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.1}  # nats, on average
REFERENCE_BYTES_MAX = 16 << 30
REFERENCE_ROOM = 2.5  # times its files: weights in another type, activations, a second copy while loading
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Look:
    """A request with its answer: all tokens, states [T, layers, H] of all but the last, log probabilities."""

    request: CaptureRequest
    token_ids: tuple[int, ...]
    states: torch.Tensor
    logprobs: tuple[float, ...] = ()

    @property
    def written(self) -> torch.Tensor:
        """The tokens that the target wrote, int64 [n]."""
        return torch.tensor(self.token_ids[len(self.request.token_ids) :])

    def predicting(self) -> torch.Tensor:
        """The last layer's states [n, H] after which the written tokens were chosen."""
        return self.states[len(self.request.token_ids) - 1 :, -1]

    def known(self) -> CaptureRequest:
        """A request to read these very tokens."""
        return CaptureRequest(self.request.sample_id, self.token_ids)


def probe_requests(encode: Callable[[str], tuple[int, ...]], positions: int | None) -> list[CaptureRequest]:
    """Greedy and sampled requests of different lengths, within the target's positions."""
    kinds = [(text, GREEDY_TOKENS, 0.0) for text in GREEDY_TEXTS]
    kinds += [(text, SAMPLED_TOKENS, TEMPERATURE) for text in SAMPLED_TEXTS]
    requests = []
    for number, (text, answer, temperature) in enumerate(kinds):
        ids = encode(text)
        if positions is not None:
            answer = min(answer, positions - 1)
            ids = ids[-(positions - answer) :]
        requests.append(CaptureRequest(f"probe {number}", ids, (), answer, temperature, seed=number))
    return requests


def refuse_wrong_text(looks: Sequence[Look], output: OutputLayer, dtype: torch.dtype) -> None:
    """Raise CaptureMismatchError unless the target may have written what the looks hold."""
    for temperature in sorted({look.request.temperature for look in looks}):
        chosen = [look for look in looks if look.request.temperature == temperature]
        logits = output(torch.cat([look.predicting() for look in chosen]))
        tokens = torch.cat([look.written for look in chosen])
        eps = max(torch.finfo(dtype).eps, torch.finfo(output.rows.dtype).eps)
        if reason := implausible(logits, tokens, temperature, eps):
            raise mismatch(reason)
        told = [number for look in chosen for number in look.logprobs]
        apart = mean_difference(logits, tokens, told) if len(told) == len(tokens) else 0.0
        if apart > LOGPROB_BOUND[dtype]:
            raise mismatch(f"its own log probabilities differ from those of its states by {apart:.2f} nats")


def refuse_wrong_states(
    looks: Sequence[Look], layers: Sequence[int], plain: Callable[[list[int]], Plain], output: OutputLayer
) -> None:
    """Raise CaptureMismatchError unless the states are those of the model's own forward, within rounding."""
    bounds = Bounds.of(looks[0].states.dtype, output.rows.dtype, experts=True)

    def served(tokens: list[int]) -> Plain:
        own = plain(tokens)
        return Plain({k: own.states[k] for k in layers if k}, own.logits)

    samples = []
    for look in looks:
        states = {f"state {k}": look.states[:, place] for place, k in enumerate(layers)}
        samples.append(Captured(look.request.sample_id, {TOKENS: torch.tensor(look.token_ids), **states}))
    try:
        compare("of the server", samples, served, output, bounds)
    except CaptureMismatchError as error:
        raise mismatch(error.what) from error


def refuse_other_states(before: Sequence[Look], now: Sequence[Look], output: OutputLayer) -> None:
    """Raise CaptureMismatchError unless a server gives the states that it gave before, within rounding."""
    bounds = Bounds.of(before[0].states.dtype, output.rows.dtype, experts=True)
    for old, new in zip(before, now, strict=True):
        errors = (new.states.float() - old.states.float()).norm(dim=-1) / old.states.float().norm(dim=-1)
        if float((errors > bounds.state).float().mean()) > bounds.stray or float(errors.mean()) > bounds.mean:
            raise mismatch("it was away, and gives other states for the same tokens than before")


def same_bits(one: Sequence[Look], other: Sequence[Look]) -> bool:
    """Whether the same requests, in any order, have the same tokens and states."""
    found = {look.request.sample_id: look for look in other}
    pairs = [(look, found[look.request.sample_id]) for look in one]
    return all(a.token_ids == b.token_ids and torch.equal(a.states, b.states) for a, b in pairs)


def why_no_reference(folder: Path, memory: Path = MEMORY) -> str:
    """Why the model is not loaded into this process; "" if it fits."""
    if method := quantisation(read_config(folder)):
        return f"it is quantised ({method}), and this process computes with plain weights"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    try:
        lines = dict(line.split(":") for line in memory.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, LookupError):
        return "the free memory of this machine is unknown"
    if size > REFERENCE_BYTES_MAX or size * REFERENCE_ROOM > free:
        return f"its {size >> 20} MiB do not fit beside what runs here"
    return ""


def mismatch(reason: str) -> CaptureMismatchError:
    return CaptureMismatchError(
        f"The server does not compute the run's target: {reason}.",
        why="A draft trained on this would imitate another model. Nothing of it was captured.",
        next="start the server as `paceline engine NAME RUN.yaml` prints, from the folder target.model; if "
        "it was, another version of the server may be right.",
    )
