"""Records what a real vLLM server sends to the engine: tests/unit/engines/recorded_vllm.

    python tests/vllm/record_wire.py --vllm .venv-vllm/bin/python [--to FOLDER]

A proxy stands between the engine and a server of a tiny random target, and keeps every exchange and every
file of states. Then come requests that the server refuses. Nothing of this machine's paths is kept.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "unit" / "engines"))

from recorded_vllm import (  # noqa: E402
    FEATURES,
    LAYERS,
    NAME,
    PATH_OF_STATES,
    RECORD,
    groups_asked,
    make_recorded_target,
)

from paceline.engines.settings import EngineRun  # noqa: E402
from paceline.engines.vllm.command import serve_command  # noqa: E402
from paceline.engines.vllm.engine import VllmEngine  # noqa: E402
from paceline.engines.vllm.settings import VllmSection  # noqa: E402
from paceline.target.settings import TargetSection  # noqa: E402

PORT, KEY_VARIABLE, KEY = 18765, "KEY_OF_THE_RECORD", "key-of-the-record"
START_S = 300.0
ARGUMENTS = (
    "--enforce-eager",
    "--no-enable-chunked-prefill",
    "--max-model-len",
    "128",
    "--max-num-seqs",
    "8",
)


class Recorder(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, states: Path, model: Path, to: Path) -> None:
        self.states, self.model, self.to = states, model, to
        self.kept: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Proxy)

    def keep(self, exchange: dict[str, Any], request_id: str) -> None:
        """Without the paths of this machine; an exchange that is known already is not kept again."""
        answer = exchange["answer"]
        named = (answer.get("kv_transfer_params") or {}).get("hidden_states_path", "")
        exchange |= {"file": "", "lock": {}}
        if named:
            data, exchange["lock"] = finished_file(Path(named))
            exchange["file"] = f"{hashlib.sha256(data).hexdigest()[:12]}.safetensors"
            (self.to / exchange["file"]).write_bytes(data)
        text = json.dumps(exchange)
        for mine, theirs in ((self.states, PATH_OF_STATES), (self.model, "/model")):
            text = text.replace(str(mine), theirs)
        if request_id:
            text = text.replace(request_id, "{request_id}")
        found = json.loads(text)
        with self.lock:
            if not any(same(found, other) for other in self.kept):
                self.kept.append(found)


class Proxy(BaseHTTPRequestHandler):
    server: Recorder
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._pass_on("GET", None)

    def do_POST(self) -> None:
        self._pass_on("POST", self.rfile.read(int(self.headers["Content-Length"])))

    def _pass_on(self, method: str, body: bytes | None) -> None:
        request_id = self.headers.get("X-Request-Id", "")
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=START_S)
        try:
            connection.request(method, self.path, body, headers)
            found = connection.getresponse()
            data = found.read()
        except OSError:
            self.close_connection = True
            return
        with suppress(ValueError):  # the answer of /health is empty
            given = {"method": method, "path": self.path, "body": json.loads(body) if body else None}
            self.server.keep(
                {**given, "status": found.status, "answer": json.loads(data or b"{}")}, request_id
            )
        self.close_connection = True
        self.send_response(found.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two exchanges differ in nothing but names and times."""
    told = [{**each["answer"], "id": "", "created": 0, "kv_transfer_params": {}} for each in (one, other)]
    asked = [
        [each["method"], each["path"], each["body"], each["status"], each["file"]] for each in (one, other)
    ]
    return told[0] == told[1] and asked[0] == asked[1]


def finished_file(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The whole file, and what its lock was when the answer came."""
    lock = Path(f"{path}.lock")
    facts = lock.stat()
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            was_held = False
        except BlockingIOError:
            was_held = True
            fcntl.flock(file, fcntl.LOCK_SH)
    known = {"suffix": ".lock", "bytes": facts.st_size, "mode": facts.st_mode & 0o777}
    return path.read_bytes(), {**known, "was_held": was_held, "mode_of_file": path.stat().st_mode & 0o777}


def refused_requests(recorder: Recorder) -> None:
    """What the server answers to requests that it cannot serve, and to one without its key."""
    url = http.client.HTTPConnection("127.0.0.1", recorder.server_address[1], timeout=START_S)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": NAME, "prompt": [5] * 200, "max_tokens": 1}, KEY),
        ({"model": "another", "prompt": [5], "max_tokens": 1}, KEY),
        ({"model": NAME, "prompt": [100000], "max_tokens": 1}, KEY),
        ({"model": NAME, "prompt": [], "max_tokens": 1}, KEY),
        (
            {"model": NAME, "prompt": [5], "max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": True},
            KEY,
        ),
        ({"model": NAME, "prompt": [5], "max_tokens": 1}, "wrong"),
    ]
    for body, key in wrong:
        headers = {
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/json",
            "Connection": "close",
        }
        url.request("POST", "/v1/completions", json.dumps(body), headers)
        url.getresponse().read()
        url.close()


def record(python: str, to: Path, scratch: Path) -> list[dict[str, Any]]:
    model, states = make_recorded_target(scratch / "model"), scratch / "states"
    states.mkdir(mode=0o700)
    script = HERE.parents[1] / "scripts" / "vllm_cpu" / "serve.py"
    section = VllmSection.parse(
        {
            "managed": True,
            "program": (python, str(script)),
            "args": ARGUMENTS,
            "connector": "repaired_connector:CpuHiddenStatesConnector",
        }
    )
    command = serve_command(section, model, "bfloat16", LAYERS, LAYERS[-1], states)
    command += ["--port", str(PORT), "--served-model-name", NAME]
    log = (scratch / "server.log").open("wb")
    environment = {**os.environ, "VLLM_API_KEY": KEY}
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    recorder = Recorder(states, model, to)
    threading.Thread(target=recorder.serve_forever, daemon=True).start()
    try:
        wait_for(server, scratch / "server.log")
        os.environ[KEY_VARIABLE] = KEY
        use(f"http://127.0.0.1:{recorder.server_address[1]}", model, states, scratch)
        refused_requests(recorder)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        recorder.shutdown()
    return recorder.kept


def wait_for(server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        with suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
            connection.request("GET", "/health", headers={"Authorization": f"Bearer {KEY}"})
            if connection.getresponse().status == 200:
                return
        time.sleep(1)
    raise SystemExit(log.read_text()[-4000:])


def use(url: str, model: Path, states: Path, scratch: Path) -> None:
    """What a run asks: the probe, answers of both kinds, and known tokens."""
    told: list[Any] = []
    run = EngineRun(
        features=lambda _: FEATURES,
        directory=scratch / "run",
        files=lambda: states,
        report=lambda event, **fields: told.append({event: fields}),
    )
    section = VllmSection.parse({"url": url, "directory": states, "api_key_variable": KEY_VARIABLE})
    engine = VllmEngine(section, TargetSection(model=model), run)
    try:
        engine.probe()
        for group in groups_asked(engine.encode):
            engine.capture(group, FEATURES)
    finally:
        engine.close()
        sys.stderr.write(json.dumps(told) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="a Python in which vLLM is installed")
    parser.add_argument("--to", type=Path, default=RECORD)
    given = parser.parse_args()
    shutil.rmtree(given.to, ignore_errors=True)
    given.to.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="paceline-wire-") as scratch:
        found = record(given.vllm, given.to, Path(scratch))
    lines = ",\n".join(json.dumps(exchange) for exchange in found)
    (given.to / "exchanges.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
