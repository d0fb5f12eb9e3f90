"""A run whose target runs in an SGLang server with the plug-in, on stand-ins for that server's parts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from paceline.engines.sglang.sink import FOLDER_VARIABLE
from paceline.testing.sglang_server import SglangServer
from paceline.testing.tiny_run import TinyRun


def test_a_run_is_captured_through_the_plug_in(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed command names what the method needs; every prompt is captured, and no file is left."""
    sink = tmp_path / "sink"
    monkeypatch.setenv(FOLDER_VARIABLE, str(sink))
    server = SglangServer(tiny_model, (2, 4, 5))
    engine = {"name": "sglang", "url": server.url, "directory": str(sink), "reference": "skip"}
    run = TinyRun(tmp_path, tiny_model, engine=engine, prompts={"rounds": 1, "max_answer_tokens": 6})
    with server.stand_in.plugged():
        server.stand_in.start()
        server.start()
        server.misbehave("http_500", 2)
        produced = run.command("produce")
        server.stop()
    assert produced.returncode == 0, produced.stdout + produced.stderr
    now = run.ledger().snapshot()
    assert (now.committed, now.prompts.failed) == (20, 0)
    assert now.facts["engine"] == {"name": "sglang", "repeats_bits": False}
    assert list(sink.iterdir()) == []
    arguments = run.arguments("engine")
    printed = run.run([*arguments[:-1], "sglang", arguments[-1]])
    words = shlex.split(printed.stdout)
    assert words[0] == f"{FOLDER_VARIABLE}={sink}"
    ids = words.index("--return-aux-hidden-state-layer-ids")
    assert words[ids + 1 : ids + 4] == ["1", "3", "4"]
