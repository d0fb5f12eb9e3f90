"""A small server that speaks SGLang's HTTP over a tiny target, with the plug-in or without.

A test can make it misbehave.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from paceline.engines.sglang.sink import FOLDER_VARIABLE, STATES, TOKENS
from paceline.testing.sglang_stand_in import Misfit, Req, StandIn
from paceline.testing.stand_in_server import StandInHandler, StandInServer

VERSION = "0.0-test"
FILE_FAULTS = (
    *("no_manifest", "no_data", "truncated", "flipped", "symlink", "fifo", "half_manifest"),
    *("other_version", "other_tokens", "other_type"),
)


class SglangServer(StandInServer):
    """`misbehave(how)` makes the next answers wrong; `served` are the requests for answers."""

    daemon_threads = False  # `stop` waits for what is being answered

    def __init__(
        self,
        model: Path,
        blocks: Sequence[int],
        *,
        misfit: Misfit | None = None,
        key: str = "",
        port: int = 0,
    ) -> None:
        self.stand_in = StandIn(model, blocks, misfit)
        self.stand_in.start()
        self.info = self.fresh_info()
        self.served: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.released = threading.Event()  # ends what hangs
        self._answering: set[str] = set()
        super().__init__(_Handler, key=key, port=port)

    def fresh_info(self) -> dict[str, Any]:
        """What the server says of itself."""
        return {
            "version": VERSION,
            "disable_radix_cache": True,
            "chunked_prefill_size": -1,
            "context_length": 200,
            "return_aux_hidden_state_layer_ids": self.stand_in.layer_ids,
        }

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def generate(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer."""
        is_repeated = self.takes("in_flight")
        with self._lock:
            self.served.append(body)
            if is_repeated or body["rid"] in self._answering:
                return 400, {"error": {"message": f"Duplicate request ID detected: {body['rid']}"}}
            self._answering.add(body["rid"])
        try:
            req = self._request(body)
            self.stand_in.serve([req])
            self._harm_file(body["rid"])
            return 200, self._answer(body, req)
        finally:
            with self._lock:
                self._answering.discard(body["rid"])

    def _request(self, body: dict[str, Any]) -> Req:
        given = body["sampling_params"]
        req = Req(
            body["rid"],
            body["input_ids"],
            max_new_tokens=given["max_new_tokens"],
            ends=given["stop_token_ids"],
            temperature=given["temperature"],
            seed=given["sampling_seed"],
            return_hidden_states=body["return_hidden_states"],
        )
        if self.takes("gibberish"):
            req.draws_from_nothing = True
        return req

    def _answer(self, body: dict[str, Any], req: Req) -> dict[str, Any]:
        given, written, states = list(body["input_ids"]), list(req.output_ids), req.hidden_states
        if self.takes("other_prompt_ids"):
            given[0] += 1
        if self.takes("cut_off"):
            written = written[:-1]
        if self.takes("null_state"):  # how the server's JSON tells of a NaN
            states[0][0][0] = None
        if self.takes("row_missing"):
            states = states[:-1]
        reason = {"type": "abort", "message": "pool"} if self.takes("abort") else req.finished_reason
        meta: dict[str, Any] = {"id": req.rid, "finish_reason": reason, "prompt_tokens": len(given)}
        if body["return_logprob"]:
            meta["output_token_logprobs"] = [
                [p, token, None] for p, token in zip(req.logprobs, written, strict=False)
            ]
        if not self.takes("no_states"):
            meta["hidden_states"] = states
        return {"text": "", "output_ids": written, "prompt_token_ids": given, "meta_info": meta}

    def _harm_file(self, name: str) -> None:
        folder = Path(os.environ.get(FOLDER_VARIABLE, "."))
        for how in FILE_FAULTS:
            if self.takes(how):
                self.stand_in.flush()
                _harm(how, folder / f"{name}.safetensors", folder / f"{name}.json")


def _harm(how: str, data: Path, manifest: Path) -> None:
    match how:
        case "no_manifest":
            manifest.unlink()
        case "no_data":
            data.unlink()
        case "truncated":
            os.truncate(data, 100)
        case "flipped":
            data.write_bytes(data.read_bytes()[:-1] + b"?")
        case "symlink":
            data.rename(data.parent.parent / "elsewhere")
            data.symlink_to(data.parent.parent / "elsewhere")
        case "fifo":
            manifest.unlink()
            os.mkfifo(manifest)
        case "half_manifest":
            os.truncate(manifest, 10)
        case "other_version":
            manifest.write_text('{"version": 2}')
        case _:
            _rewrite(how, data, manifest)


def _rewrite(how: str, data: Path, manifest: Path) -> None:
    tensors = load_file(data)
    if how == "other_tokens":
        tensors[TOKENS][0] += 1
    else:
        tensors[STATES] = tensors[STATES].half()
    content = save(tensors)
    data.write_bytes(content)
    told = json.loads(manifest.read_bytes())
    told |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(told))


class _Handler(StandInHandler):
    server: SglangServer

    def get(self) -> None:
        if self.knows_key():
            self.answer(200, self.server.info if self.path == "/server_info" else {})

    def post(self, body: Any) -> None:
        if self.path == "/abort_request":
            self.server.aborted.append(body["rid"])
            self.answer(200, "")
        elif self.server.takes("http_500"):
            self.answer(500, {"error": {"message": "Internal Server Error"}})
        elif self.server.takes("http_400"):
            self.answer(400, {"error": {"message": "The input is longer than the model's context length"}})
        elif self.server.takes("reset"):
            self.connection.close()
        elif self.server.takes("hang"):
            self.server.released.wait()
        elif self.server.takes("not_json"):
            self.answer(200, "<html>")
        else:
            self.answer(*self.server.generate(body))
