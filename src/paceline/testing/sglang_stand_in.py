"""Stand-ins for the parts of SGLang that the sink hooks: their names, arguments, and the order of calls.

They follow release 0.5.23 as far as the sink sees it, and compute with a tiny model of the library. No code
of SGLang is here, and none is needed.
"""

from __future__ import annotations

import enum
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from paceline.engines.hooks import Hooks
from paceline.engines.sglang import sink
from paceline.target.layer_ids import LAYER_IDS

SEED = 42  # of a request that names none


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"


class CaptureHiddenMode(enum.IntEnum):
    FULL = 2

    def is_full(self) -> bool:
        return True


class Req:
    """A request inside the server's scheduler."""

    def __init__(
        self,
        rid: str,
        input_ids: Sequence[int],
        *,
        max_new_tokens: int,
        ends: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = SEED,
        return_hidden_states: bool = True,
    ) -> None:
        self.rid = rid
        self.origin_input_ids = list(input_ids)
        self.output_ids: list[int] = []
        self.logprobs: list[float] = []
        self.max_new_tokens, self.ends, self.temperature = max_new_tokens, set(ends), temperature
        self.noise = torch.Generator().manual_seed(seed)
        self.return_hidden_states = return_hidden_states
        self.hidden_states: list[Any] = []
        self.finished_reason: dict[str, Any] | None = None
        self.finished_len: int | None = None
        self.is_retracted = False
        self.retraction_count = 0
        self.inflight_middle_chunks = 0
        self.draws_from_nothing = False  # its sampler is broken

    def finished(self) -> bool:
        return self.finished_reason is not None

    def take(self, token: int, logprob: float) -> None:
        self.output_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.ends:
            self.finished_reason = {"type": "stop", "matched": token}
        elif len(self.output_ids) >= self.max_new_tokens:
            self.finished_reason = {"type": "length", "length": self.max_new_tokens}


@dataclass
class LogitsProcessorOutput:
    next_token_logits: torch.Tensor
    hidden_states: torch.Tensor | None = None


@dataclass
class Misfit:
    """How this server differs from the one that the sink expects."""

    cached: int = 0  # tokens of a prompt that it takes from a cache
    chunk: int = 0  # tokens of a prompt in one forward; 0: all
    norm_elsewhere: bool = False  # its family has a final norm of its own
    shift: int = 0  # blocks by which its family's numbering is off
    retract_after: int = -1  # written tokens after which a request is begun anew
    spoil: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda states: states)


class StandIn:
    """One server process: a model, a scheduler without a loop, and the modules by SGLang's names."""

    def __init__(self, folder: Path, blocks: Sequence[int], misfit: Misfit | None = None) -> None:
        """`blocks`: the layers that it is started with, in Paceline's numbers."""
        self._lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._misfit = misfit or Misfit()
        self._lock = threading.Lock()
        self.layer_ids = LAYER_IDS["sglang.eagle3"].written(blocks, len(self._lm.model.layers))
        self.modules = _modules()
        self._processor = self._of(sink._RESULTS)()
        self._streamer = self._of(sink._OUTPUT)()
        self._logits = self._of(sink._LOGITS)()
        self.sink: sink.Sink | None = None

    def start(self) -> None:
        """What the server does before its first request."""
        self._blocks = [number + 1 + self._misfit.shift for number in self.layer_ids]
        parts = [SimpleNamespace(), SimpleNamespace(layers_to_capture=self._blocks)]
        model = SimpleNamespace(modules=lambda: iter(parts))
        self._of(f"{sink._CAPTURE}.configure_aux_hidden_state_capture")(model=model)

    def flush(self) -> None:
        """Wait until the sink has written what it was given."""
        if self.sink is not None:
            self.sink._finished.join()

    def serve(self, batch: Sequence[Req]) -> None:
        """Answer the requests together."""
        with self._lock, torch.inference_mode():
            self._prefill(batch)
            while running := [req for req in batch if not req.finished()]:
                self._decode(running)

    def _prefill(self, batch: Sequence[Req]) -> None:
        misfit = self._misfit
        texts = [[*req.origin_input_ids, *req.output_ids] for req in batch]
        size = misfit.chunk or max(map(len, texts))
        for start in range(misfit.cached, max(map(len, texts)), size):
            lengths = [max(0, min(len(text), start + size) - start) for text in texts]
            output = self._forward([text[: start + size] for text in texts], lengths)
            offset = 0
            for req, text, length, logits in zip(
                batch, texts, lengths, output.next_token_logits, strict=True
            ):
                is_last = start < len(text) <= start + size
                req.inflight_middle_chunks = int(not is_last)
                if length:
                    offset = self._processor._append_prefill_hidden_states(
                        req=req,
                        logits_output=output,
                        hidden_state_offset=offset,
                        capture_hidden_mode=CaptureHiddenMode.FULL,
                        extend_input_len=length,
                        store=is_last,
                    )
                if is_last:
                    self._choose(req, logits)
            self._streamer.stream_output(list(batch), False)

    def _decode(self, running: Sequence[Req]) -> None:
        if len(running[0].output_ids) == self._misfit.retract_after:
            self._misfit.retract_after = -1
            for req in running:
                req.retraction_count += 1
            self._prefill(running)
            return
        output = self._forward([[*r.origin_input_ids, *r.output_ids] for r in running], [1] * len(running))
        for row, req in enumerate(running):
            self._choose(req, output.next_token_logits[row])
            self._processor._append_decode_hidden_states(
                req=req, hidden_states=output.hidden_states, start=row, accept_len=1
            )
        self._streamer.stream_output(list(running), False)

    def _choose(self, req: Req, logits: torch.Tensor) -> None:
        heated = logits / (req.temperature or 1.0)
        if req.draws_from_nothing:
            heated = torch.zeros_like(heated)
            heated[list(req.ends)] = -torch.inf
        if req.temperature or req.draws_from_nothing:
            noise = torch.empty_like(heated).exponential_(generator=req.noise)
            token = int((heated.softmax(-1) / noise).argmax())
        else:
            token = int(heated.argmax())
        req.take(token, float(heated.log_softmax(-1)[token]))

    def _forward(self, texts: Sequence[Sequence[int]], lengths: Sequence[int]) -> LogitsProcessorOutput:
        """Read each text; the last `lengths` tokens of each have rows."""
        model = self._lm.model
        found: list[list[torch.Tensor]] = []
        count = len(model.layers)
        with Hooks(model.layers, [*self._blocks, count]) as hooks:
            for text, length in zip(texts, lengths, strict=True):
                model(input_ids=torch.tensor([text]), use_cache=False)
                states = [hooks.taken[k][0, len(text) - length :] for k in (*self._blocks, count)]
                found.append([self._misfit.spoil(state) for state in states])
        *aux, last = (torch.cat(parts) for parts in zip(*found, strict=True))
        norm = self._of(f"{sink._NORM}.final_norm")
        normed = model.norm(last) if self._misfit.norm_elsewhere else norm(last, None, model.norm)
        stored = self._logits._get_hidden_states_to_store(normed, None, aux, None, None, None, None, None)
        ends = torch.tensor(lengths).cumsum(0) - 1
        return LogitsProcessorOutput(self._lm.lm_head(normed[ends]), stored)

    def _of(self, target: str) -> Any:
        where, _, name = target.rpartition(".")
        return getattr(self.modules[where], name)

    @contextmanager
    def plugged(self) -> Iterator[None]:
        """Within, SGLang's modules are these, and the plug-in has been loaded as the server loads it."""
        assert "sglang" not in sys.modules, "the stand-ins cannot take the place of a loaded SGLang"
        sys.modules.update(self.modules)
        try:
            self.sink = sink.register()
            self.modules["sglang.srt.plugins.hook_registry"].HookRegistry.apply_hooks()
            yield
        finally:
            for name in self.modules:
                del sys.modules[name]


def _modules() -> dict[str, ModuleType]:
    """New modules with new classes, because hooks change them."""
    parts: dict[str, dict[str, Any]] = {
        sink._CAPTURE: {"configure_aux_hidden_state_capture": lambda *, model: None},  # noqa: ARG005
        sink._NORM: {"final_norm": _final_norm},
        "sglang.srt.plugins.hook_registry": {"HookType": HookType, "HookRegistry": _registry()},
        "sglang.srt.runtime_context": {
            "get_parallel": lambda: SimpleNamespace(attn_tp_rank=0, attn_cp_rank=0),
        },
    }
    for target, kind in ((sink._LOGITS, _Logits), (sink._RESULTS, _Results), (sink._OUTPUT, _Streamer)):
        where, _, name = target.rpartition(".")
        parts[where] = {name: type(name, (), dict(vars(kind)))}
    modules: dict[str, ModuleType] = {}
    for where, content in parts.items():
        names = where.split(".")
        for end in range(1, len(names) + 1):
            modules.setdefault(".".join(names[:end]), ModuleType(".".join(names[:end])))
        vars(modules[where]).update(content)
    return modules


def _final_norm(
    hidden_states: torch.Tensor,
    forward_batch: Any,  # noqa: ARG001
    layernorm: Callable[[torch.Tensor], torch.Tensor],
    capture: Callable[[torch.Tensor], None] | None = None,
    *,
    skip_empty: bool = False,  # noqa: ARG001
) -> torch.Tensor:
    if capture is not None:
        capture(hidden_states)
    return layernorm(hidden_states)


class _Logits:
    def _get_hidden_states_to_store(
        self,
        hidden_states: torch.Tensor,
        hidden_states_before_norm: torch.Tensor | None,
        aux_hidden_states: list[torch.Tensor],
        *others: Any,
    ) -> torch.Tensor:
        return torch.cat(aux_hidden_states, dim=-1)


class _Results:
    def _append_prefill_hidden_states(
        self,
        *,
        req: Req,
        logits_output: LogitsProcessorOutput,
        hidden_state_offset: int,
        capture_hidden_mode: CaptureHiddenMode,
        extend_input_len: int,
        store: bool = True,
    ) -> int:
        end = hidden_state_offset + extend_input_len
        assert logits_output.hidden_states is not None
        if store and req.return_hidden_states:
            req.hidden_states.append(logits_output.hidden_states[hidden_state_offset:end].tolist())
        return end

    @staticmethod
    def _append_decode_hidden_states(
        *, req: Req, hidden_states: torch.Tensor, start: int, accept_len: int
    ) -> None:
        if req.return_hidden_states:
            req.hidden_states.extend(hidden_states[start : start + accept_len].tolist())


class _Streamer:
    def stream_output(self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None) -> None:
        for req in reqs:
            if req.finished() and req.finished_len is None:
                req.finished_len = len(req.output_ids)


def _registry() -> Any:
    """A registry of hooks with SGLang's meaning of each kind."""

    class HookRegistry:
        hooks: dict[str, list[tuple[HookType, Callable[..., Any]]]] = defaultdict(list)

        @classmethod
        def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
            cls.hooks[target].append((hook_type, hook))

        @classmethod
        def apply_hooks(cls) -> None:
            for target, hooks in cls.hooks.items():
                where, _, name = target.rpartition(".")
                owner = sys.modules.get(where)
                if owner is None:
                    module, _, owner_name = where.rpartition(".")
                    owner = getattr(sys.modules[module], owner_name)
                original = vars(owner)[name]
                is_static = isinstance(original, staticmethod)
                wrapped = original.__func__ if is_static else original
                for kind, hook in hooks:
                    wrapped = _wrapped(wrapped, hook, kind)
                setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)

    return HookRegistry


def _wrapped(original: Callable[..., Any], hook: Callable[..., Any], kind: HookType) -> Callable[..., Any]:
    def before(*args: Any, **kwargs: Any) -> Any:
        changed = hook(*args, **kwargs)
        args, kwargs = changed if changed is not None else (args, kwargs)
        return original(*args, **kwargs)

    def after(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    def around(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return {HookType.BEFORE: before, HookType.AFTER: after, HookType.AROUND: around}[kind]
