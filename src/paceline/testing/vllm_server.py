"""A small server that speaks vLLM's HTTP and leaves hidden states in files, over a real tiny target.

It answers with the transformers engine, one request at a time, so its states and texts are the target's own.
A test can make it misbehave in every way that a real one can. `python -m paceline.testing.vllm_server MODEL
--port N ...` understands the arguments that a managed server is started with.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.target.head import TargetHead
from paceline.testing.stand_in_server import StandInHandler, StandInServer
from paceline.types import Feature, States, Tokens

VERSION = "0.0-test"
LOCK_HELD_S = 0.02  # a real writer takes a while after the answer
HANG_S = 30.0


@dataclass(frozen=True)
class Wanted:
    """A request for an answer, as the server read it."""

    body: dict[str, Any]
    request_id: str = ""

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.body["prompt"])

    @property
    def includes_outputs(self) -> bool:
        return bool((self.body.get("kv_transfer_params") or {}).get("include_output_tokens"))


class VllmServer(StandInServer):
    """`misbehave(how)` makes the next answers wrong; `served` counts the requests for answers.

    `tokenizer_end`: the token that ends answers besides those of the request, unless that has `ignore_eos`.
    """

    daemon_threads = True
    tokenizer_end: int | None = None

    def __init__(
        self,
        model: Path,
        folder: Path,
        layers: tuple[int, ...],
        *,
        dtype: str = "float32",
        key: str = "",
        port: int = 0,
    ) -> None:
        self.folder, self.layers = folder, layers
        self._engine = TransformersEngine(model, dtype=dtype)
        self._output = TargetHead.load(model).output()
        self.name = str(model)
        self.served: list[Wanted] = []
        self._writers: list[threading.Thread] = []
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(_Handler, key=key, port=port)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.finish_writes()

    def finish_writes(self) -> None:
        """Wait until every file that was begun is written."""
        while self._writers:
            self._writers.pop().join()

    def behave(self) -> None:
        """Forget all faults that are left, the key, the tokenizer's end, and every file."""
        with self._lock:
            self._faults.clear()
        self.finish_writes()
        self.key = ""
        self.tokenizer_end = None
        for path in self.folder.iterdir():
            path.unlink()

    # -- an answer -------------------------------------------------------------------------

    def complete(self, wanted: Wanted) -> dict[str, Any]:
        body = wanted.body
        dtype, last = self._engine.facts.dtype, self._engine.facts.num_hidden_layers
        asked = (*self.layers, last)
        features = [Feature(f"{n}", States((k,)), dtype=dtype) for n, k in enumerate(asked)]
        features.append(Feature("tokens", Tokens(), dtype="int64"))
        request = CaptureRequest(
            "", wanted.prompt, (), int(body["max_tokens"]), float(body["temperature"]), int(body["seed"])
        )
        with self._lock:
            self.served.append(wanted)
            [sample] = self._engine.capture(
                [request], [Feature("tokens", Tokens(), dtype="int64"), *features]
            )
        given = len(wanted.prompt)
        tokens = self._up_to_an_end(sample.tensors["tokens"], wanted)
        written = tokens[given:].tolist()
        if self.takes("gibberish"):  # its states are right for the tokens that it wrote
            return self._gibberish(wanted, len(written))
        logits = self._output(sample.tensors[f"{len(self.layers)}"][given - 1 : len(tokens) - 1])
        states = torch.stack([sample.tensors[f"{n}"] for n in range(len(self.layers))], dim=1)
        count = len(tokens) - 1 if wanted.includes_outputs and not self.takes("old_version") else given
        path = self._write(wanted.request_id, tokens[:count], states[:count])
        chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(written)[:, None])
        logprobs = chosen[:, 0].tolist()
        if self.takes("other_prompt_ids"):
            given_ids = [*wanted.prompt[1:], wanted.prompt[0]]
        else:
            given_ids = list(wanted.prompt)
        choice = {
            "prompt_token_ids": given_ids,
            "token_ids": written[:-1] if self.takes("cut_off") else written,
            "logprobs": {"token_logprobs": logprobs} if body.get("logprobs") else None,
        }
        return {"choices": [choice], "kv_transfer_params": {"hidden_states_path": path}}

    def _up_to_an_end(self, tokens: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """The tokens up to the first written one that the server's tokenizer names as the end."""
        if self.tokenizer_end is None or wanted.body["ignore_eos"]:
            return tokens
        given = len(wanted.prompt)
        ends = (tokens[given:] == self.tokenizer_end).nonzero()
        return tokens[: given + int(ends[0]) + 1] if len(ends) else tokens

    def _gibberish(self, wanted: Wanted, count: int) -> dict[str, Any]:
        """Tokens drawn from nothing, with the states that they really have."""
        draw = torch.Generator().manual_seed(int(wanted.body["seed"]))
        ends = set(wanted.body["stop_token_ids"])
        allowed = torch.tensor([t for t in range(self._engine.facts.vocab_size) if t not in ends])
        answer = allowed[torch.randint(0, len(allowed), (int(wanted.body["max_tokens"]),), generator=draw)]
        tokens = torch.cat([torch.tensor(wanted.prompt), answer])
        dtype = self._engine.facts.dtype
        features = [Feature(f"{n}", States((k,)), dtype=dtype) for n, k in enumerate(self.layers)]
        with self._lock:
            [sample] = self._engine.capture([CaptureRequest("", tuple(tokens.tolist()))], features)
        states = torch.stack([sample.tensors[f"{n}"] for n in range(len(self.layers))], dim=1)
        path = self._write(wanted.request_id, tokens[:-1], states)
        choice = {"prompt_token_ids": list(wanted.prompt), "token_ids": answer.tolist()}
        return {"choices": [choice], "kv_transfer_params": {"hidden_states_path": path}}

    def _write(self, request_id: str, tokens: torch.Tensor, states: torch.Tensor) -> str:
        """Write the file as the real one does: by a thread, under a lock that is held before the answer."""
        path = self.folder / f"cmpl-{request_id}-0-{uuid.uuid4().hex[:8]}.safetensors"
        tokens, states = self._harmed(tokens.clone(), states.clone().contiguous())
        data = save({"hidden_states": states, "token_ids": tokens})
        if self.takes("path_outside"):
            path = self.folder.parent / path.name
        lock = path.with_name(path.name + ".lock")
        if not self.takes("no_lock"):
            fd = os.open(lock, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX)
            writer = threading.Thread(target=self._finish, args=(fd, path, data), daemon=True)
            self._writers.append(writer)
            writer.start()
        return str(path)

    def _harmed(self, tokens: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.takes("wrong_tokens"):
            tokens[0] += 1
        if self.takes("nan"):
            states[-1, 0, 0] = float("nan")
        if self.takes("zero_row"):
            states[0, 1] = 0.0
        if self.takes("wrong_width"):
            states = states[:, :, :-1].contiguous()
        if self.takes("layer_missing"):
            states = states[:, :-1].contiguous()
        if self.takes("wrong_dtype"):
            states = states.half()
        if self.takes("other_layers"):
            states = states.roll(1, dims=1)
        return tokens, states

    def _finish(self, fd: int, path: Path, data: bytes) -> None:
        time.sleep(LOCK_HELD_S)
        if self.takes("stale_lock"):
            time.sleep(HANG_S)
        if self.takes("truncated"):
            path.write_bytes(data[: len(data) // 2])
        elif self.takes("symlink"):
            elsewhere = path.with_suffix(".elsewhere")
            elsewhere.write_bytes(data)
            path.symlink_to(elsewhere)
        elif not self.takes("missing"):
            path.write_bytes(data)
        os.close(fd)


class _Handler(StandInHandler):
    server: VllmServer

    def get(self) -> None:
        if self.path == "/version":
            self.answer(200, {"version": VERSION})
        elif self.knows_key():
            self.answer(200, {"data": [{"id": self.server.name, "max_model_len": 256, "parent": None}]})

    def post(self, body: Any) -> None:
        wanted = Wanted(body, self.headers.get("X-Request-Id", uuid.uuid4().hex))
        if self.server.takes("die"):
            os._exit(1)
        if self.server.takes("http_500"):
            self.answer(500, {"error": "EngineCore encountered an issue"})
        elif self.server.takes("http_400"):
            self.answer(400, {"error": "too long"})
        elif self.server.takes("reset"):
            self.connection.close()
        elif self.server.takes("hang"):
            time.sleep(HANG_S)
        elif self.server.takes("no_path"):
            self.answer(200, {**self.server.complete(wanted), "kv_transfer_params": None})
        elif self.server.takes("not_json"):
            self.answer(200, "<html>")
        else:
            self.answer(200, self.server.complete(wanted))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "--dtype", "--host", "--port", "--speculative-config", "--kv-transfer-config"):
        parser.add_argument(name)
    given, _ = parser.parse_known_args()
    speculative, transfer = json.loads(given.speculative_config), json.loads(given.kv_transfer_config)
    layers = speculative["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
    folder = Path(transfer["kv_connector_extra_config"]["shared_storage_path"])
    VllmServer(
        Path(given.model),
        folder,
        tuple(layers),
        dtype=given.dtype,
        key=os.environ.get("VLLM_API_KEY", ""),
        port=int(given.port),
    ).serve_forever()


if __name__ == "__main__":
    main()
