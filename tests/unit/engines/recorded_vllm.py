"""What a real vLLM server sent, recorded: its small target, and a server that gives the same answers again.

tests/vllm/record_wire.py writes the record. It holds every exchange in its order, as JSON, and each file of
states that the server left, as it was. A request that was not recorded is answered with 599, which no test
takes for an answer.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.engines.engine import CaptureRequest
from paceline.testing.stand_in_server import StandInHandler, StandInServer
from paceline.testing.tiny_folder import write_tokenizer
from paceline.testing.tiny_target import VOCAB
from paceline.types import Feature, States, Tokens

RECORD = Path(__file__).parent / "recorded_vllm"
NAME = "target"  # under which the server served it
LAYERS = (1, 2, 4)  # the last proves the text
POSITIONS = 128
PATH_OF_STATES = "/states"  # stands for the folder in the record
NOT_RECORDED = 599
FEATURES = (Feature("tokens", Tokens(), dtype="int64"), Feature("s", States(LAYERS), dtype="bfloat16"))


def make_recorded_target(folder: Path) -> Path:
    """The target that was served: a random Llama of four layers in bfloat16, of a head size that vLLM has."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    draw = torch.Generator().manual_seed(5)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=draw))
            else:
                weight.copy_(torch.randn(weight.shape, generator=draw) * (0.4 if "lm_head" in name else 0.3))
    model.to(torch.bfloat16).save_pretrained(folder)
    return write_tokenizer(folder)


def groups_asked(encode: Callable[[str], tuple[int, ...]]) -> list[list[CaptureRequest]]:
    """What was asked after the probe: greedy answers, sampled ones, and the states of known tokens."""
    texts = ("a wheel", "the wind", "one rider after another")
    greedy = [CaptureRequest(f"g{n}", encode(text), (), 6, seed=n) for n, text in enumerate(texts)]
    sampled = [CaptureRequest(f"s{n}", encode(text), (), 12, 0.7, seed=n) for n, text in enumerate(texts)]
    known = [CaptureRequest("k", encode("in line")), CaptureRequest("k of one", (1, 7))]
    return [greedy, sampled, known]


@dataclass(frozen=True)
class Exchange:
    """One request and its answer. `file`: of the record, "" if the answer names none; `lock`: what was beside
    it."""

    method: str
    path: str
    body: Any
    status: int
    answer: Any
    file: str
    lock: dict[str, Any]

    @property
    def asked(self) -> str:
        return json.dumps([self.method, self.path, self.body], sort_keys=True)


def exchanges(record: Path = RECORD) -> list[Exchange]:
    return [Exchange(**each) for each in json.loads((record / "exchanges.json").read_text())]


class RecordedServer(StandInServer):
    """Answers as recorded: the same request the second time with the second answer, the last one for ever."""

    def __init__(self, folder: Path, record: Path = RECORD, key: str = "") -> None:
        self.folder, self.record = folder, record
        self.not_recorded: list[Any] = []
        self.found: dict[str, list[Exchange]] = {}
        for each in exchanges(record):
            self.found.setdefault(each.asked, []).append(each)
        self._times: Counter[str] = Counter()
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(_Handler, key=key)

    def exchange(self, method: str, path: str, body: Any, request_id: str) -> tuple[int, Any]:
        asked = json.dumps([method, path, body], sort_keys=True)
        with self._lock:
            known = self.found.get(asked)
            if known is None:
                self.not_recorded.append([method, path, body])
                return NOT_RECORDED, {"error": "this request was not recorded"}
            each = known[min(self._times[asked], len(known) - 1)]
            self._times[asked] += 1
        return each.status, self._with_file(each, request_id) if each.file else each.answer

    def _with_file(self, each: Exchange, request_id: str) -> Any:
        """The recorded answer with its file, named after this request as the server named it."""
        named = Path(each.answer["kv_transfer_params"]["hidden_states_path"])
        path = self.folder / named.name.replace("{request_id}", request_id)
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY, each.lock["mode"])
        fcntl.flock(lock, fcntl.LOCK_EX)
        path.write_bytes((self.record / each.file).read_bytes())
        os.close(lock)
        return {**each.answer, "kv_transfer_params": {"hidden_states_path": str(path)}}


class _Handler(StandInHandler):
    server: RecordedServer

    def get(self) -> None:
        self.answer(*self.server.exchange("GET", self.path, None, ""))

    def post(self, body: Any) -> None:
        self.answer(*self.server.exchange("POST", self.path, body, self.headers.get("X-Request-Id", "")))
