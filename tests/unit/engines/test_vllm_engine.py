"""The vLLM engine against a server that fails in every known way: waited for, tried again, or refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.engines.engine import CaptureRequest
from paceline.engines.served import engine as engine_module
from paceline.engines.served.own_files import own_prefix
from paceline.engines.settings import EngineRun
from paceline.engines.transformers import TransformersEngine
from paceline.engines.vllm.engine import VllmEngine
from paceline.engines.vllm.settings import VllmSection
from paceline.errors import CaptureMismatchError, ConfigError, EngineError, ServerUnavailableError
from paceline.target.settings import TargetSection
from paceline.target.tokenizer import PromptEncoder
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.vllm_server import VllmServer
from paceline.types import Feature, States, Tokens

LAYERS = (1, 4, 8)
FEATURES = (Feature("tokens", Tokens(), dtype="int32"), Feature("s", States(LAYERS), dtype="float32"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module", autouse=True)
def _one_encoder(tiny_model: Path) -> Iterator[None]:
    """Each engine would start a process for the chat template."""
    encoder = PromptEncoder(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "PromptEncoder", lambda *_, **__: encoder)
        yield


@pytest.fixture(scope="module")
def running(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    started = VllmServer(tiny_model, tmp_path_factory.mktemp("states"), LAYERS).start()
    yield started
    started.stop()


@pytest.fixture
def server(running: VllmServer) -> VllmServer:
    """The one server of this file, well behaved and without files."""
    running.behave()
    return running


class Made:
    """Makes engines for the server, and keeps what they report."""

    def __init__(self, server: VllmServer, model: Path, folder: Path) -> None:
        self.server, self.model, self.folder = server, model, folder
        self.events: list[tuple[str, dict[str, object]]] = []
        self.engines: list[VllmEngine] = []
        self.is_stopping = False

    def __call__(self, **knobs: object) -> VllmEngine:
        given = {"url": self.server.url, "directory": self.server.folder, "patience_s": 5.0, **knobs}
        section = VllmSection.parse({name: value for name, value in given.items() if value is not None})
        run = EngineRun(
            features=lambda _: FEATURES,
            directory=self.folder / "run",
            files=lambda: self.folder / "states",
            should_stop=lambda: self.is_stopping,
            report=lambda event, **fields: self.events.append((event, fields)),
        )
        engine = VllmEngine(section, TargetSection(model=self.model, dtype="float32"), run)
        self.engines.append(engine)
        return engine

    def told(self, event: str) -> list[dict[str, object]]:
        return [fields for name, fields in self.events if name == event]


@pytest.fixture
def make(server: VllmServer, tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., VllmEngine]]:
    made = Made(server, tiny_model, tmp_path)
    yield made
    for engine in made.engines:
        engine.close()


@pytest.fixture(scope="module")
def engine(
    running: VllmServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    """An engine with the usual settings, for tests that leave it as it was."""
    made = Made(running, tiny_model, tmp_path_factory.mktemp("run"))
    yield made()
    made.engines[0].close()


def group(engine: VllmEngine, count: int = 4, **how: Any) -> list[CaptureRequest]:
    prompts = ["a wheel", "the wind", "in line", "one rider after another"][:count]
    return [
        CaptureRequest(f"s{n}", engine.encode(text), max_new_tokens=6, seed=n, **how)
        for n, text in enumerate(prompts)
    ]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.tensors[name], b.tensors[name]) for a, b in pairs for name in a.tensors)


def test_it_captures_what_the_target_itself_gives_and_leaves_no_file(
    engine: VllmEngine, server: VllmServer, tiny_model: Path
) -> None:
    """Greedy and sampled, one request a prompt, with every setting of sampling named."""
    for temperature in (0.0, 0.8):
        asked = group(engine, temperature=temperature)
        own = TransformersEngine(tiny_model, dtype="float32")
        alone = [own.capture([request], FEATURES)[0] for request in asked]
        assert same(engine.capture(asked, FEATURES), alone)
    assert left_in(server.folder) == []
    body = server.served[-1].body
    assert (body["top_p"], body["top_k"], body["repetition_penalty"], body["n"]) == (1.0, 0, 1.0, 1)
    assert body["stop_token_ids"] == list(engine.facts.eos_token_ids)
    assert not engine.facts.repeats_bits
    assert engine.facts.groups_in_flight_max > 1


def test_an_end_that_only_the_servers_tokenizer_names_ends_no_answer(
    engine: VllmEngine, server: VllmServer, tiny_model: Path
) -> None:
    """Answers end where the target's generation_config.json says, whichever engine runs it."""
    asked = group(engine, 1)
    alone = TransformersEngine(tiny_model, dtype="float32").capture(asked, FEATURES)
    server.tokenizer_end = int(alone[0].tensors["tokens"][len(asked[0].token_ids)])
    assert same(engine.capture(asked, FEATURES), alone)


def test_several_groups_are_in_flight_at_once(make: Made, server: VllmServer) -> None:
    """Each thread gets its own group's samples."""
    engine = make(requests_in_flight=3)
    asked = [group(engine, temperature=t) for t in (0.0, 0.5, 0.9)]
    expected = [engine.capture(requests, FEATURES) for requests in asked]
    found: dict[int, Any] = {}

    def capture(place: int) -> None:
        found[place] = engine.capture(asked[place], FEATURES)

    threads = [threading.Thread(target=capture, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[place], samples) for place, samples in enumerate(expected))


def test_a_server_that_leaves_out_the_answers_states_is_asked_again_for_the_whole_text(
    engine: VllmEngine, server: VllmServer
) -> None:
    """Older versions do not know include_output_tokens; the file tells, no version number is believed."""
    expected = engine.capture(group(engine), FEATURES)
    before = len(server.served)
    server.misbehave("old_version", 4)
    again = engine.capture(group(engine), FEATURES)
    assert len(server.served) - before > 4
    for one, other in zip(again, expected, strict=True):
        assert torch.equal(one.tensors["tokens"], other.tensors["tokens"])
        torch.testing.assert_close(one.tensors["s"], other.tensors["s"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fault", ["http_500", "reset", "truncated", "missing", "not_json", "cut_off", "no_lock"]
)
def test_a_failure_that_may_pass_is_tried_again(
    engine: VllmEngine, server: VllmServer, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples are those of a server that did not fail, and no file stays."""
    monkeypatch.setattr(VllmEngine, "_pause", lambda *_: None)
    expected = engine.capture(group(engine), FEATURES)
    server.misbehave(fault, 2)
    assert same(engine.capture(group(engine), FEATURES), expected)
    if fault not in (
        "cut_off",
        "not_json",
    ):  # the engine cannot know the file of an answer that it cannot read
        assert [name for name in left_in(server.folder) if not name.endswith(".lock")] == []


@pytest.mark.parametrize("fault", ["hang", "stale_lock"])
def test_a_server_that_hangs_is_given_up_after_its_time(
    make: Made, server: VllmServer, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same request is sent once more."""
    monkeypatch.setattr("paceline.testing.vllm_server.HANG_S", 1.0)
    engine = make(timeout_s=0.5)
    expected = engine.capture(group(engine, 1), FEATURES)
    server.misbehave(fault)
    assert same(engine.capture(group(engine, 1), FEATURES), expected)


class Counting:
    """In place of a managed server: it runs, and counts how often it is ended."""

    stops = 0

    def ensure(self, silent_s: float) -> bool:
        return False

    def stop(self) -> None:
        self.stops += 1

    def was_ready(self) -> None: ...

    def answered(self) -> None: ...


def test_a_managed_server_that_hangs_is_ended_once(
    make: Made, server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several requests time out together; the server that the first one's failure brings is not ended."""
    monkeypatch.setattr("paceline.testing.vllm_server.HANG_S", 1.0)
    monkeypatch.setattr(VllmEngine, "_pause", lambda *_: None)
    engine = make(timeout_s=0.5)
    engine._gate.enter()
    engine._server = counting = Counting()  # type: ignore[assignment]
    server.misbehave("hang", 3)
    assert len(engine.capture(group(engine, 3), FEATURES)) == 3
    assert counting.stops == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong_tokens", "other tokens than"),
        ("other_prompt_ids", "read other tokens than it was sent"),
        ("wrong_width", "the run expects"),
        ("layer_missing", "the run expects"),
        ("wrong_dtype", "the run expects"),
        ("nan", "not finite"),
        ("zero_row", "all zero"),
        ("path_outside", "not a file of"),
        ("symlink", "not a regular file .a link"),
        ("no_path", "without hidden states"),
        ("http_400", "refused a request"),
        ("gibberish", "does not compute the run's target: 6 sampled tokens"),
    ],
)
def test_what_is_not_the_runs_own_is_refused(
    engine: VllmEngine, server: VllmServer, fault: str, words: str
) -> None:
    """By its reason, and never tried again: nothing of it is stored."""
    engine.capture(group(engine, 1), FEATURES)
    before = len(server.served)
    server.misbehave(fault)
    with pytest.raises(EngineError, match=words):
        engine.capture(group(engine, 1, temperature=0.3), FEATURES)
    assert len(server.served) <= before + 1
    if fault not in ("other_prompt_ids", "no_path"):  # whose answers name no file that could be believed
        server.finish_writes()
        assert [name for name in left_in(server.folder) if name.endswith(".safetensors")] == []


def test_a_request_that_fails_again_and_again_fails_alone(
    engine: VllmEngine, server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its id and the server's words, so that isolation finds the prompt."""
    monkeypatch.setattr(VllmEngine, "_pause", lambda *_: None)
    engine.capture([], FEATURES)
    server.misbehave("http_500", 3)
    with pytest.raises(EngineError, match=r"failed 3 times on s0 .*EngineCore encountered an issue"):
        engine.capture(group(engine, 1), FEATURES)


def test_a_server_that_is_away_is_waited_for_and_one_that_stays_away_fails_no_prompt(
    make: Made, server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is told; at its end comes an error that isolation takes for no prompt's fault."""
    monkeypatch.setattr("paceline.engines.served.gate.TOLD_AFTER_S", 0.2)
    engine = make(patience_s=1.0)
    server.misbehave("sick", 3)
    assert len(engine.capture(group(engine, 2), FEATURES)) == 2
    assert [fields["state"] for fields in make.told("server")] == ["waiting", "ready"]
    server.misbehave("sick", 1000)
    server.misbehave("reset", 1000)
    with pytest.raises(ServerUnavailableError, match=r"has not answered for 1 s.*no prompt failed"):
        engine.capture(group(engine, 2), FEATURES)


def test_a_stop_ends_every_wait_for_the_server(make: Made, server: VllmServer) -> None:
    """A hanging request and a sick server: the run stops at once, and nothing is lost."""
    engine = make()
    engine.capture(group(engine, 1), FEATURES)
    server.misbehave("sick", 1000)
    make.is_stopping = True
    with pytest.raises(ServerUnavailableError, match="was stopped"):
        engine.capture(group(engine, 2), FEATURES) or engine.capture(group(engine, 2), FEATURES)
    server.misbehave("hang")
    with pytest.raises(ServerUnavailableError, match="was stopped"):
        engine.capture(group(engine, 1), FEATURES)


def test_the_probe_tells_what_it_found(make: Made) -> None:
    """Compared with the model's own forward; the bits of other batches are reported and not relied on."""
    make().probe()
    [note] = make.told("note")
    assert "its states are the model's own; its text is what the target would write" in str(note["message"])
    assert "it gave the same bits, which nothing depends on" in str(note["message"])
    make(reference="skip").probe()
    assert "were not compared with the model's (by choice)" in str(make.told("note")[1]["message"])


@pytest.mark.parametrize("reference", ["auto", "skip"])
def test_a_sampler_that_writes_gibberish_is_refused_though_its_states_are_right(
    make: Made, server: VllmServer, reference: str
) -> None:
    """With and without a reference: the text's likelihood comes from the captured states."""
    server.misbehave("gibberish", 1000)
    with pytest.raises(CaptureMismatchError, match="tokens"):
        make(reference=reference).probe()


def test_states_of_other_layers_are_refused_by_the_reference(make: Made, server: VllmServer) -> None:
    """The last layer alone is also known by the text."""
    server.misbehave("other_layers", 1000)
    with pytest.raises(CaptureMismatchError, match="does not compute the run's target"):
        make().probe()


def test_a_server_that_comes_back_as_another_one_is_refused(
    make: Made, server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure or a pause it must give the states that it gave when it was compared."""
    engine = make()
    engine.probe()
    server.misbehave("reset")
    engine.capture(group(engine, 1), FEATURES)
    monkeypatch.setattr(engine_module, "PAUSE_S", -1.0)
    engine.capture(group(engine, 1), FEATURES)
    server.misbehave("other_layers", 1000)
    with pytest.raises(CaptureMismatchError, match="gives other states for the same tokens"):
        engine.capture(group(engine, 1), FEATURES)


def test_layers_that_the_server_does_not_write_are_refused(engine: VllmEngine) -> None:
    """Before anything is sent."""
    with pytest.raises(EngineError, match=r"after 3 blocks were requested; .* those after 1, 4, 8"):
        engine.capture(group(engine), (Feature("s", States((3,)), dtype="float32"),))


def test_files_that_nobody_waits_for_are_removed_and_young_ones_stay(make: Made, server: VllmServer) -> None:
    """A crash leaves files; the young one may be that of a request in flight."""
    own = f"cmpl-{own_prefix(make.folder / 'run')}-"
    for name, age in ((f"{own}old", 10_000), (f"{own}young", 0)):
        for suffix in (".safetensors", ".safetensors.lock"):
            path = server.folder / f"{name}{suffix}"
            path.touch()
            at = path.stat().st_mtime - age
            os.utime(path, (at, at))
    engine = make()
    engine.capture(group(engine, 1), FEATURES)
    assert left_in(server.folder) == [f"{own}young.safetensors", f"{own}young.safetensors.lock"]
    assert f"cmpl-{server.served[-1].request_id}".startswith(own)


def test_a_sweep_leaves_what_is_not_the_runs_own(make: Made, server: VllmServer) -> None:
    """A user's folder may hold a model; another run that shares it has files of its own in flight."""
    others = f"cmpl-{own_prefix(make.folder / 'other')}-1-0.safetensors"
    names = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors", "x.lock", others]
    for name in names:
        (server.folder / name).touch()
        os.utime(server.folder / name, (0, 0))
    engine = make()
    engine.capture(group(engine, 1), FEATURES)
    engine._files.sweep()
    assert left_in(server.folder) == sorted(names)


def test_the_key_is_read_from_the_environment_and_never_told(
    make: Made, server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing variable, a missing key and a wrong one are told by name."""
    server.key = "quite-secret"
    with pytest.raises(ConfigError, match="wants a key, and none was given"):
        make().probe()
    with pytest.raises(ConfigError, match="no environment variable VLLM_KEY_OF_TESTS"):
        make(api_key_variable="VLLM_KEY_OF_TESTS")
    monkeypatch.setenv("VLLM_KEY_OF_TESTS", "wrong-secret")
    with pytest.raises(ConfigError, match="The server refuses the key") as caught:
        make(api_key_variable="VLLM_KEY_OF_TESTS").probe()
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("VLLM_KEY_OF_TESTS", "quite-secret")
    engine = make(api_key_variable="VLLM_KEY_OF_TESTS")
    assert len(engine.capture(group(engine, 1), FEATURES)) == 1


def test_a_given_answer_is_read_and_not_written(engine: VllmEngine, server: VllmServer) -> None:
    """A lost sample is captured again from its own tokens; the server writes one token that is dropped."""
    request = group(engine, 1)[0]
    [sample] = engine.capture([request], FEATURES)
    tokens = tuple(sample.tensors["tokens"].tolist())
    known = replace(request, token_ids=tokens, max_new_tokens=0)
    [again] = engine.capture([known], FEATURES)
    assert torch.equal(again.tensors["tokens"], sample.tensors["tokens"])
    torch.testing.assert_close(again.tensors["s"], sample.tensors["s"], atol=1e-4, rtol=1e-4)
    assert (server.served[-1].prompt, server.served[-1].body["max_tokens"]) == (tokens[:-1], 1)
