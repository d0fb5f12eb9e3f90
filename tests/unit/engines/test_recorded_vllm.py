"""The vLLM engine against what a real server sent: the same requests go out, and its answers are taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorded_vllm import (
    FEATURES,
    LAYERS,
    NAME,
    NOT_RECORDED,
    POSITIONS,
    Exchange,
    RecordedServer,
    exchanges,
    groups_asked,
    make_recorded_target,
)

from paceline.engines.served.http import Http, TryAgainError
from paceline.engines.settings import EngineRun
from paceline.engines.transformers import TransformersEngine
from paceline.engines.vllm.engine import VllmEngine
from paceline.engines.vllm.settings import VllmSection
from paceline.errors import ConfigError, EngineError
from paceline.target.settings import TargetSection

STATE_ERROR_MAX = 0.06  # of a row's norm, on average, as the probe has it: two implementations in bfloat16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recorded_target(tmp_path_factory.mktemp("recorded") / "model")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordedServer]:
    started = RecordedServer(tmp_path_factory.mktemp("states")).start()
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def engine(
    server: RecordedServer, model: Path, notes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    """After its probe, so that everything that follows is believed."""
    folder = tmp_path_factory.mktemp("run")
    run = EngineRun(
        features=lambda _: FEATURES,
        directory=folder,
        files=lambda: server.folder,
        report=lambda event, **fields: notes.append(str(fields.get("message", event))),
    )
    section = VllmSection.parse({"url": server.url, "directory": server.folder})
    made = VllmEngine(section, TargetSection(model=model), run)
    made.probe()
    yield made
    made.close()


def test_the_probe_believes_the_real_server(engine: VllmEngine, notes: list[str]) -> None:
    """Its states are the model's own after each layer, its text and log probabilities those of its states."""
    [told] = [note for note in notes if "its states" in note]
    assert told.startswith("vLLM 0.32.0: its states are the model's own; its text is what the target")
    assert engine.facts.max_positions == POSITIONS


def test_answers_and_states_are_the_targets_and_no_file_stays(
    engine: VllmEngine, server: RecordedServer, model: Path
) -> None:
    """Greedy, sampled and given tokens: read in this process, they have the states that the server wrote."""
    own = TransformersEngine(model, dtype="bfloat16")
    for group in groups_asked(engine.encode):
        for request, sample in zip(group, engine.capture(group, FEATURES), strict=True):
            tokens, states = sample.tensors["tokens"], sample.tensors["s"].float()
            assert tuple(tokens[: len(request.token_ids)].tolist()) == request.token_ids
            assert 0 <= len(tokens) - len(request.token_ids) <= request.max_new_tokens
            known = type(request)(request.sample_id, tuple(tokens.tolist()))
            plain = own.capture([known], FEATURES)[0].tensors["s"].float()
            assert states.shape == plain.shape
            for one, other in zip(states.chunk(len(LAYERS), 1), plain.chunk(len(LAYERS), 1), strict=True):
                assert float(((one - other).norm(dim=1) / other.norm(dim=1)).mean()) < STATE_ERROR_MAX
    assert list(server.folder.glob("*.safetensors")) == []
    assert server.not_recorded == []


def test_the_server_takes_the_requests_id_into_the_names_of_its_files() -> None:
    """By which a run knows its own. Beside each lies an empty lock; some are held when the answer comes."""
    with_file = [each for each in exchanges() if each.file and each.body["model"] == NAME]
    named = [Path(each.answer["kv_transfer_params"]["hidden_states_path"]).name for each in with_file]
    own = [name for name in named if "{request_id}" in name]
    assert len(own) >= 20
    assert all(name.startswith("cmpl-{request_id}") and name.endswith(".safetensors") for name in own)
    assert {each.lock["bytes"] for each in with_file} == {0}
    assert {each.lock["suffix"] for each in with_file} == {".lock"}


def refused(status: int, part: str) -> Exchange:
    [found] = [each for each in exchanges() if each.status == status and part in json.dumps(each.body)]
    return found


@pytest.mark.parametrize(
    ("status", "part", "error", "words"),
    [
        (400, "5, 5, 5, 5", EngineError, "maximum context length"),
        (404, "another", EngineError, "does not exist"),
        (400, "100000", EngineError, "out of vocabulary"),
        (400, '"prompt": []', EngineError, "at least one prompt"),
        (401, '"prompt": [5]', ConfigError, "The server wants a key"),
    ],
)
def test_what_the_server_refuses_is_refused_with_its_words(
    status: int, part: str, error: type[Exception], words: str
) -> None:
    """And is not tried again: no request of these can succeed."""
    each = refused(status, part)
    with pytest.raises(error, match=words) as caught:
        Http("http://127.0.0.1:9").refuse_status(each.status, json.dumps(each.answer).encode())
    assert not isinstance(caught.value, TryAgainError)


def test_a_request_that_was_not_recorded_is_no_answer(server: RecordedServer) -> None:
    """So a request of the engine that has changed fails these tests until the record is made again."""
    status, _ = Http(server.url).exchange("POST", "/v1/completions", {"model": NAME, "prompt": [1]}, 5.0)
    assert status == NOT_RECORDED
    server.not_recorded.clear()
