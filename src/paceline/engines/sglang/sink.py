"""A plug-in of SGLang's server: it writes the states of each request to a file, for the producer to read.

The server loads it through the entry point `sglang.srt.plugins` and, where FOLDER_VARIABLE names a folder,
hooks the functions of HOOKS. Without that variable it does nothing. A request takes part if its `rid` is an
id of the producer's (ID) and it asks for hidden states; its answer carries none, for they are in the file.

The file does not lie in the run's feature store. The store belongs to the producer, which alone reserves
bytes and knows generations; it reads the file, verifies it, and stores the tensors under its own digest. The
client chooses the id, so a repeated request overwrites its file, and the client knows each name that is left.

Beside the layers that the server captures by itself, a row holds the state after the last block. The server
has it while it applies its final norm; it is taken only if the logits are made of that very norm's output.

It imports nothing of Paceline but this file, and SGLang only when the server loads it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pkgutil
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from safetensors.torch import save

FOLDER_VARIABLE = "PACELINE_SGLANG_SINK"
ID = re.compile(r"paceline-[0-9a-f]{32}")
VERSION = 1
STATES, TOKENS = "hidden_states", "token_ids"
WAITING_MAX = 64  # requests whose file is not yet written; the server waits before it takes more
_ROWS = "_paceline_rows"

_CAPTURE = "sglang.srt.model_executor.model_runner_components.attention_backend_setup"
_NORM = "sglang.srt.layers.layer_boundary.residual.batch"
_LOGITS = "sglang.srt.layers.logits_processor.LogitsProcessor"
_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_OUTPUT = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"

# Each hooked function: the kind of hook, the method of Sink, and the arguments that it must have.
HOOKS = {
    f"{_CAPTURE}.configure_aux_hidden_state_capture": ("AFTER", "note_blocks", "model"),
    f"{_NORM}.final_norm": ("AROUND", "keep_last", "hidden_states forward_batch layernorm capture"),
    f"{_LOGITS}._get_hidden_states_to_store": (
        "AFTER",
        "join_last",
        "self hidden_states hidden_states_before_norm aux_hidden_states",
    ),
    f"{_RESULTS}._append_prefill_hidden_states": (
        "AROUND",
        "keep_prefill",
        "self req logits_output hidden_state_offset capture_hidden_mode extend_input_len store",
    ),
    f"{_RESULTS}._append_decode_hidden_states": (
        "AROUND",
        "keep_decode",
        "req hidden_states start accept_len",
    ),
    f"{_OUTPUT}.stream_output": ("BEFORE", "write_finished", "self reqs return_logprob skip_req"),
}


class SinkError(Exception):
    """The sink cannot work here. SGLang logs it and goes on without; the producer then finds no file."""


@dataclass
class Rows:
    """The states [n, W] of a request's tokens so far. `retractions`: how often the server began it anew."""

    retractions: int
    parts: list[torch.Tensor] = field(default_factory=list)


def register() -> Sink | None:
    """What SGLang calls in each of its processes. Raises SinkError for an unknown SGLang."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    sink = Sink(_own_folder(Path(folder)), _is_first_rank)
    registry = import_module("sglang.srt.plugins.hook_registry")
    for target, (_, _, arguments) in HOOKS.items():
        _check(target, arguments.split())
    for target, (kind, method, _) in HOOKS.items():
        registry.HookRegistry.register(target, getattr(sink, method), registry.HookType[kind])
    return sink


class Sink:
    """The hooks. They run on the scheduler's thread; a thread of the sink's own writes the files."""

    def __init__(self, folder: Path, is_first_rank: Callable[[], bool]) -> None:
        self._folder = folder
        self._is_first_rank = is_first_rank
        self._blocks: list[int] | None = None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._finished: Queue[Callable[[], None]] = Queue(WAITING_MAX)
        self._writer: threading.Thread | None = None

    # -- the model: what a row holds -------------------------------------------------------

    def note_blocks(self, result: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Note after how many blocks the model captures, by its own count; None if it does not say so."""
        model = kwargs["model"] if "model" in kwargs else args[0]
        told = [getattr(part, "layers_to_capture", None) for part in model.modules()]
        blocks = [sorted(counts) for counts in told if counts]
        self._blocks = blocks[0] if len(blocks) == 1 else None

    def keep_last(
        self, final_norm: Callable[..., Any], *args: Any, capture: Any = None, **kwargs: Any
    ) -> Any:
        """The final norm; keeps a copy of what it normed, with its result."""
        taken: list[torch.Tensor] = []

        def both(state: torch.Tensor) -> None:
            if capture is not None:
                capture(state)
            taken.append(state.clone())  # the server uses this memory again

        normed = final_norm(*args, capture=both, **kwargs)
        self._last = (normed, taken[0]) if taken else None
        return normed

    def join_last(
        self,
        stored: torch.Tensor | None,
        processor: Any,  # noqa: ARG002
        hidden_states: torch.Tensor,
        before_norm: torch.Tensor | None,
        aux_hidden_states: Any,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> torch.Tensor | None:
        """The captured rows with the state after the last block beside them, if it is that of these rows."""
        last, self._last = self._last, None
        if stored is None or aux_hidden_states is None or before_norm is not None or last is None:
            return stored
        normed, state = last
        if normed is not hidden_states or len(state) != len(stored):
            return stored
        return torch.cat([stored, state.to(stored.dtype)], dim=-1)

    # -- the scheduler: whose rows they are ------------------------------------------------

    def keep_prefill(self, append: Callable[..., int], processor: Any, **given: Any) -> int:
        """Keep the rows of a request's prompt, those of each of its chunks too."""
        req = given["req"]
        if not _takes_part(req) or not given["capture_hidden_mode"].is_full():
            return append(processor, **given)
        start = given["hidden_state_offset"]
        end: int = start + given["extend_input_len"]
        if not req.finished() and not req.is_retracted:
            self._keep(req, given["logits_output"].hidden_states[start:end])
        return end

    def keep_decode(
        self,
        append: Callable[..., None],
        *,
        req: Any,
        hidden_states: torch.Tensor,
        start: int,
        accept_len: int,
    ) -> None:
        """Keep the row of a written token."""
        if not _takes_part(req):
            append(req=req, hidden_states=hidden_states, start=start, accept_len=accept_len)
        elif accept_len > 0:
            self._keep(req, hidden_states[start : start + accept_len])

    def write_finished(self, streamer: Any, reqs: Sequence[Any], *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Hand the finished requests to the writer, before the server answers them."""
        for req in reqs:
            if req.finished() and (rows := req.__dict__.pop(_ROWS, None)) is not None:
                tokens = [*req.origin_input_ids, *req.output_ids[: req.finished_len]]
                job = partial(write, self._folder, req.rid, tokens, rows.parts, self._blocks)
                self._write_later(job)

    def _keep(self, req: Any, rows: torch.Tensor) -> None:
        if not self._is_first_rank():
            return
        kept = req.__dict__.get(_ROWS)
        if kept is None or kept.retractions != req.retraction_count:  # the server reads everything anew
            kept = req.__dict__[_ROWS] = Rows(req.retraction_count)
        kept.parts.append(rows.to("cpu", copy=True))

    def _write_later(self, job: Callable[[], None]) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="paceline-sink", daemon=True)
            self._writer.start()
        self._finished.put(job)

    def _write_all(self) -> None:
        while True:
            self._finished.get()()
            self._finished.task_done()


# -- files -----------------------------------------------------------------------------------


def write(
    folder: Path,
    request_id: str,
    tokens: Sequence[int],
    parts: list[torch.Tensor],
    blocks: Sequence[int] | None,
) -> None:
    """Write a request's file, then its manifest. A name appears only with all its bytes behind it.

    `tokens`: all, the last included, which has no state. `parts`: the states [n, W], in order. An error
    becomes a manifest with its words.
    """
    manifest: dict[str, Any] = {"version": VERSION, "blocks": blocks}
    try:
        states = torch.cat(parts)
        if len(states) != len(tokens) - 1:
            raise SinkError(f"the server computed {len(states)} states for {len(tokens)} tokens")
        data = save({STATES: states, TOKENS: torch.tensor(tokens, dtype=torch.int64)})
        _replace(folder / f"{request_id}.safetensors", data)
        manifest |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    except Exception as error:  # noqa: BLE001 (the thread must live, and the reader must know)
        manifest["error"] = f"{type(error).__name__}: {error}"[:500]
    try:
        _replace(folder / f"{request_id}.json", json.dumps(manifest).encode())
    except OSError:
        (folder / f"{request_id}.safetensors").unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    """Nothing is synced: after a crash of the machine the producer asks again."""
    aside = path.with_name(f".{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(aside, flags, 0o600), "wb") as file:
        file.write(data)
    aside.rename(path)


def _own_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise SinkError(f"{folder} belongs to another user, or others may write to it")
    return folder.resolve()


# -- the server ------------------------------------------------------------------------------


def _takes_part(req: Any) -> bool:
    return req.return_hidden_states is True and ID.fullmatch(req.rid) is not None


def _is_first_rank() -> bool:
    """Whether this process is the one of its group that answers."""
    parallel = import_module("sglang.srt.runtime_context").get_parallel()
    return bool(parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0)


def _check(target: str, arguments: Sequence[str]) -> None:
    where, _, name = target.rpartition(".")
    found: Mapping[str, Any] = inspect.signature(getattr(pkgutil.resolve_name(where), name)).parameters
    missing = [argument for argument in arguments if argument not in found]
    if missing:
        raise SinkError(f"{target} takes no {', '.join(missing)}: this SGLang is not one that the sink knows")
