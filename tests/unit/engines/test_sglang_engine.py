"""The SGLang engine against a server that fails in every known way: waited for, tried again, or refused."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.engines.engine import CaptureRequest
from paceline.engines.served.own_files import own_prefix
from paceline.engines.settings import EngineRun
from paceline.engines.sglang import files
from paceline.engines.sglang.engine import SglangEngine
from paceline.engines.sglang.settings import SglangSection
from paceline.engines.sglang.sink import FOLDER_VARIABLE
from paceline.engines.transformers import TransformersEngine
from paceline.errors import CaptureMismatchError, ConfigError, EngineError, ServerUnavailableError
from paceline.target.settings import TargetSection
from paceline.testing.sglang_server import SglangServer
from paceline.testing.sglang_stand_in import Misfit
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.types import Feature, States, Tokens

AUX, LAST = (1, 4), 8
TOKENS = Feature("tokens", Tokens(), dtype="int32")
SOME = (TOKENS, Feature("s", States(AUX), dtype="float32"))
ALL = (TOKENS, Feature("s", States((*AUX, LAST)), dtype="float32"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("sglang") / "model")


class Made:
    """A server, with the plug-in if `sink` is a folder, and the engines made for it."""

    def __init__(self, model: Path, folder: Path, sink: Path | None, misfit: Misfit | None = None) -> None:
        self.model, self.folder, self.sink = model, folder, sink
        self.server = SglangServer(model, AUX, misfit=misfit).start()
        self.engines: list[SglangEngine] = []
        self.events: list[tuple[str, dict[str, object]]] = []
        self.is_stopping = False

    @property
    def features(self) -> tuple[Feature, ...]:
        return ALL if self.sink else SOME

    def __call__(self, features: tuple[Feature, ...] | None = None, **knobs: object) -> SglangEngine:
        given = {"url": self.server.url, "directory": self.sink, "patience_s": 5.0, **knobs}
        section = SglangSection.parse({name: value for name, value in given.items() if value is not None})
        run = EngineRun(
            features=lambda _: features or self.features,
            directory=self.folder / "run",
            files=lambda: self.folder,
            should_stop=lambda: self.is_stopping,
            report=lambda event, **fields: self.events.append((event, fields)),
        )
        engine = SglangEngine(section, TargetSection(model=self.model, dtype="float32"), run)
        self.engines.append(engine)
        return engine

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.server.stop()
        self.server.stand_in.flush()

    def renew(self) -> Made:
        """As after the start, for the next test."""
        server = self.server
        server._faults.clear()
        server.served.clear()
        server.aborted.clear()
        server.key = ""
        server.info = server.fresh_info()
        server.stand_in._misfit = Misfit()
        server.stand_in.start()
        self.is_stopping = False
        return self

    @cached_property
    def own(self) -> TransformersEngine:
        return TransformersEngine(self.model, dtype="float32")

    @cached_property
    def engine(self) -> SglangEngine:
        """One that no test changes."""
        return self()


@pytest.fixture(scope="module")
def one_stock(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    made = Made(tiny_model, tmp_path_factory.mktemp("stock"), None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def one_plugged(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("plugged")
    made = Made(tiny_model, folder, folder / "sink")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder / "sink"))
        with made.server.stand_in.plugged():
            yield made
            made.close()


@pytest.fixture
def stock(one_stock: Made) -> Made:
    return one_stock.renew()


@pytest.fixture
def plugged(one_plugged: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(SglangEngine, "_pause", lambda *_: None)
    return one_plugged.renew()


def group(engine: SglangEngine, count: int = 4, **how: Any) -> list[CaptureRequest]:
    prompts = ["a wheel", "the wind", "in line", "one rider after another"][:count]
    return [
        CaptureRequest(f"s{i}", engine.encode(prompt), max_new_tokens=6, seed=i, **how)
        for i, prompt in enumerate(prompts)
    ]


def assert_own(engine: SglangEngine, made: Made, temperature: float = 0.0) -> None:
    """What the engine captures are the target's own states of the tokens that it captured."""
    own = made.own
    requests = group(engine, temperature=temperature)
    for sample in engine.capture(requests, made.features):
        tokens = tuple(sample.tensors["tokens"].tolist())
        [known] = own.capture([CaptureRequest(sample.sample_id, tokens)], made.features)
        torch.testing.assert_close(sample.tensors["s"], known.tensors["s"], atol=1e-4, rtol=1e-4)


# -- the two ways ------------------------------------------------------------------------------


def test_stock_answers_hold_the_states_of_the_named_layers(stock: Made) -> None:
    """Greedy and sampled; the probe compares them, and the text, with the model in this process."""
    engine = stock()
    engine.probe()
    for temperature in (0.0, 0.9):
        assert_own(engine, stock, temperature)
    [told] = [fields["message"] for event, fields in stock.events if event == "note"]
    assert "SGLang 0.0-test: its states are the model's own" in str(told)


def test_the_plug_in_gives_the_state_after_the_last_block_too(plugged: Made) -> None:
    """And leaves no file behind that was read."""
    engine = plugged.engine
    for temperature in (0.0, 0.9):
        assert_own(engine, plugged, temperature)
    assert plugged.sink is not None
    assert list(plugged.sink.iterdir()) == []


def test_the_wire_is_that_of_0_5_23(stock: Made) -> None:
    """The fields of a request as they were read in that release; every setting of sampling is named."""
    engine = stock.engine
    engine.capture(group(engine, 1, temperature=0.5), stock.features)
    body = stock.server.served[-1]
    assert set(body) == {
        *("rid", "input_ids", "sampling_params", "return_hidden_states", "return_prompt_token_ids"),
        *("return_logprob", "logprob_start_len", "stream"),
    }
    assert body["return_hidden_states"] is True
    assert body["sampling_params"]["temperature"] == 0.5
    assert body["sampling_params"]["stop_token_ids"] == [2]
    assert stock.server.stand_in.layer_ids == [0, 3]  # SGLang names the block


def test_a_repeated_request_has_the_same_id(stock: Made) -> None:
    """So that it overwrites the file of the first; another sample or seed has another id."""
    engine = stock.engine
    requests = group(engine)
    for _ in range(2):
        engine.capture(requests, stock.features)
    engine.capture([replace(requests[0], seed=9)], stock.features)
    ids = [body["rid"] for body in stock.server.served]
    assert sorted(ids[:4]) == sorted(ids[4:8])
    assert len(set(ids)) == 5


def test_two_samples_with_the_same_tokens_have_ids_of_their_own(stock: Made) -> None:
    """Given answers may repeat; one sample's request must not abort the other's, or read its file."""
    engine = stock.engine
    [request] = group(engine, 1)
    given = [replace(request, sample_id=name, max_new_tokens=0) for name in ("one", "other")]
    samples = engine.capture(given, stock.features)
    assert len({body["rid"] for body in stock.server.served}) == 2
    assert stock.server.aborted == []
    assert torch.equal(samples[0].tensors["s"], samples[1].tensors["s"])


# -- what the server cannot give ---------------------------------------------------------------


def test_a_method_that_needs_the_last_state_is_refused_without_the_plug_in(stock: Made) -> None:
    """Before anything is sent, with advice."""
    with pytest.raises(ConfigError, match=r"state after the last block \(8\).*engine.directory"):
        stock(ALL)
    with pytest.raises(ConfigError, match="only the model itself can prove"):
        stock(reference="skip")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            {"return_aux_hidden_state_layer_ids": [1, 3]},
            r"captures the layers \[1, 3\]; the method needs \[0, 3\]",
        ),
        ({"return_aux_hidden_state_layer_ids": None}, "captures no layers"),
        ({"disable_radix_cache": False}, "keeps prefixes"),
        ({"chunked_prefill_size": 2048}, "in chunks of 2048"),
    ],
)
def test_a_server_that_cannot_give_the_layers_is_refused_at_connect(
    stock: Made, said: dict[str, Any], reason: str
) -> None:
    """By what it says of itself, before a text is sent."""
    stock.server.info |= said
    with pytest.raises(EngineError, match=reason + ".*paceline engine sglang RUN.yaml"):
        stock.engine._connect(0.0)
    assert stock.server.served == []


def test_a_server_of_another_kind_is_refused(stock: Made) -> None:
    """An address of another program answers, too."""
    stock.server.info.clear()
    with pytest.raises(EngineError, match="does not describe itself as SGLang does"):
        stock.engine._connect(0.0)


def test_a_server_without_the_plug_in_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """It answers with states of its own, and writes no file."""
    sink = tmp_path / "sink"
    sink.mkdir(mode=0o700)
    made = Made(tiny_model, tmp_path, sink)
    try:
        with pytest.raises(EngineError, match="plug-in is not loaded"):
            made().probe()
    finally:
        made.close()


def refuses_states(made: Made, misfit: Misfit, reason: str) -> None:
    made.server.stand_in._misfit = misfit
    made.server.stand_in.start()
    with pytest.raises(EngineError, match=reason):
        made.engine.capture(group(made.engine, 1), made.features)


@pytest.mark.parametrize(
    ("misfit", "reason"),
    [
        (Misfit(shift=1), r"blocks \[2, 5\] and the last; the run needs those after blocks \[1, 4, 8\]"),
        (Misfit(norm_elsewhere=True), "has a final norm that the plug-in does not see"),
        (Misfit(cached=1), r"computed \d+ states for \d+ tokens"),
        (Misfit(spoil=lambda states: states * torch.nan), "not finite"),
        (Misfit(spoil=lambda states: states * 0), "all zero"),
    ],
)
def test_states_of_another_kind_are_refused(plugged: Made, misfit: Misfit, reason: str) -> None:
    """Other blocks, no last state, cached prefixes, not finite, or zero."""
    refuses_states(plugged, misfit, reason)


@pytest.mark.parametrize(
    ("misfit", "reason"),
    [
        (Misfit(cached=1), "--disable-radix-cache"),
        (Misfit(chunk=2), "--chunked-prefill-size -1"),
        (Misfit(spoil=lambda states: states * torch.nan), "not finite"),
        (Misfit(spoil=lambda states: states * 0), "all zero"),
    ],
)
def test_stock_states_of_another_kind_are_refused(stock: Made, misfit: Misfit, reason: str) -> None:
    """By their number and their content."""
    refuses_states(stock, misfit, reason)


@pytest.mark.parametrize("way", ["stock", "plugged"])
def test_states_that_are_not_the_models_own_are_refused(way: str, request: pytest.FixtureRequest) -> None:
    """By the model in this process: other blocks under the right numbers, or a little noise."""
    made: Made = request.getfixturevalue(way)
    shifted, noisy = Misfit(shift=1), Misfit(spoil=lambda states: states + 0.01)
    made.server.stand_in._misfit = shifted if way == "stock" else noisy
    made.server.stand_in.start()
    with pytest.raises(CaptureMismatchError, match="states after block 1 differ"):
        made().probe()


def test_states_of_another_type_are_refused(stock: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in another type gives numbers that the run's type does not hold."""
    engine = stock.engine
    monkeypatch.setattr(engine, "_dtype", torch.bfloat16)
    with pytest.raises(EngineError, match="not of type bfloat16"):
        engine.capture(group(engine, 1), stock.features)


@pytest.mark.parametrize("way", ["stock", "plugged"])
def test_a_broken_sampler_is_refused(way: str, request: pytest.FixtureRequest) -> None:
    """Its states are right for the wrong tokens; the text is improbable, at the start and later."""
    made: Made = request.getfixturevalue(way)
    engine = made()
    made.server.misbehave("gibberish", 100)
    with pytest.raises(CaptureMismatchError, match="does not compute the run's target"):
        engine.probe()
    engine = made.engine
    long = [replace(request, max_new_tokens=40) for request in group(engine)]
    with pytest.raises(CaptureMismatchError, match="does not compute the run's target"):
        engine.capture(long, made.features)


# -- what passes, and what does not -------------------------------------------------------------

PASSING = ("http_500", "reset", "not_json", "cut_off", "abort", "sick", "in_flight")


@pytest.mark.parametrize("how", PASSING)
def test_a_server_that_fails_once_is_asked_again(plugged: Made, how: str) -> None:
    """One failure costs a repetition."""
    engine = plugged() if how == "sick" else plugged.engine
    plugged.server.misbehave(how)
    assert_own(engine, plugged)
    assert not plugged.server.takes(how)


@pytest.mark.parametrize(
    "how", ["no_data", "truncated", "flipped", "half_manifest", "other_tokens", "no_manifest"]
)
def test_a_file_that_is_not_whole_is_asked_for_again(plugged: Made, how: str) -> None:
    """Missing, cut off, changed, or of other tokens."""
    engine = plugged(timeout_s=1.0)
    plugged.server.misbehave(how)
    assert_own(engine, plugged)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("symlink", "not a regular file"),
        ("fifo", "not a regular file"),
        ("other_version", "another version of the plug-in"),
        ("other_type", "torch.float16"),
    ],
)
def test_a_file_of_another_kind_is_refused(plugged: Made, how: str, reason: str) -> None:
    """Nothing is read through a link, and nothing waits at a FIFO."""
    engine = plugged.engine
    plugged.server.misbehave(how)
    with pytest.raises(CaptureMismatchError, match=reason):
        engine.capture(group(engine, 1), plugged.features)


@pytest.mark.parametrize(
    ("how", "reason"),
    [("other_prompt_ids", "read other tokens"), ("http_400", "longer than the model's context")],
)
def test_an_answer_that_would_be_wrong_again_is_an_error(plugged: Made, how: str, reason: str) -> None:
    """The prompt is then searched for like any that fails."""
    engine = plugged.engine
    plugged.server.misbehave(how)
    with pytest.raises(EngineError, match=reason):
        engine.capture(group(engine, 1), plugged.features)


@pytest.mark.parametrize("how", ["null_state", "row_missing", "no_states"])
def test_stock_states_that_are_not_whole_are_an_error(stock: Made, how: str) -> None:
    """A NaN, which JSON tells as null; a row too few; none at all."""
    engine = stock.engine
    stock.server.misbehave(how)
    with pytest.raises(EngineError, match=r"not numbers|instead of"):
        engine.capture(group(engine, 1), stock.features)


def test_a_request_that_is_still_answered_is_aborted_and_sent_again(plugged: Made) -> None:
    """A retry has the id of the request that it repeats."""
    engine = plugged.engine
    plugged.server.misbehave("in_flight")
    engine.capture(group(engine, 1), plugged.features)
    assert plugged.server.aborted == [plugged.server.served[0]["rid"]]


def test_a_server_that_hangs_is_given_up_in_time(plugged: Made) -> None:
    """The request is repeated; the connection that is closed makes a real server drop the first."""
    engine = plugged(timeout_s=0.5)
    plugged.server.misbehave("hang")
    assert_own(engine, plugged)


def test_a_dead_server_is_waited_for_and_nothing_is_lost(tiny_model: Path, tmp_path: Path) -> None:
    """It comes back at the same address; the group that waited is captured whole."""
    made = Made(tiny_model, tmp_path, None)
    engine = made(patience_s=60.0)
    engine.capture(group(engine, 1), SOME)
    made.server.stop()
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.extend(engine.capture(group(engine), SOME)))
    waiting.start()
    made.server = SglangServer(tiny_model, AUX, port=int(made.server.server_address[1])).start()
    waiting.join()
    made.close()
    assert [sample.sample_id for sample in found] == ["s0", "s1", "s2", "s3"]


def test_a_server_that_stays_away_ends_the_run_and_fails_no_prompt(stock: Made) -> None:
    """After the patience, with the command to go on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        engine = stock(patience_s=0.2, url=f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(ServerUnavailableError, match="no prompt failed"):
        engine.capture(group(engine), SOME)


def test_the_key_comes_from_its_variable_and_is_never_told(
    stock: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in an error nor in what the engine shows of itself."""
    stock.server.key = "a-secret-key"
    with pytest.raises(ConfigError, match="wants a key"):
        stock.engine._connect(0.0)
    with pytest.raises(ConfigError, match="no environment variable SGLANG_KEY"):
        stock(api_key_variable="SGLANG_KEY")
    monkeypatch.setenv("SGLANG_KEY", "a-secret-key")
    engine = stock(api_key_variable="SGLANG_KEY")
    engine.capture(group(engine, 1), stock.features)
    stock.server.key = "another"
    with pytest.raises(ConfigError, match="refuses the key") as refused:
        engine.capture(group(engine, 1), stock.features)
    assert "a-secret-key" not in str(refused.value)


# -- files -------------------------------------------------------------------------------------


def test_files_that_nobody_waits_for_are_removed_by_age(plugged: Made) -> None:
    """The run's own, after a kill; those of a live request, of another run and of the user stay."""
    assert plugged.sink is not None
    own = own_prefix(plugged.folder / "run")
    old, half = plugged.sink / f"{own}0.json", plugged.sink / f".{own}1.json.new"
    new = plugged.sink / f".{own}2.json.new"
    others = f"{own_prefix(plugged.folder / 'other')}0.safetensors"
    foreign = [plugged.sink / name for name in ("config.json", "model.safetensors", others)]
    for path in (old, half, new, *foreign):
        path.write_text("{}")
    for path in (old, half, *foreign):
        os.utime(path, (0, 0))
    engine = plugged()
    engine.capture(group(engine, 1), plugged.features)
    assert plugged.server.served[-1]["rid"].startswith(own)
    left = sorted(plugged.sink.iterdir())
    for path in left:
        path.unlink()
    assert left == sorted([new, *foreign])


def test_a_stale_file_of_the_same_id_is_not_read(plugged: Made) -> None:
    """It is removed before the request is sent."""
    engine = plugged.engine
    [request] = group(engine, 1)
    engine.capture([request], plugged.features)
    name = plugged.server.served[-1]["rid"]
    assert plugged.sink is not None
    (plugged.sink / f"{name}.json").write_text(json.dumps({"version": 1, "error": "stale"}))
    engine.capture([request], plugged.features)


def test_a_stopped_run_waits_for_no_file(plugged: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends within a look."""
    engine = plugged.engine
    take = files.SinkFiles.take

    def stop_first(self: files.SinkFiles, *args: Any) -> torch.Tensor:
        plugged.is_stopping = True
        return take(self, *args)

    monkeypatch.setattr(files.SinkFiles, "take", stop_first)
    plugged.server.misbehave("no_manifest")
    with pytest.raises(ServerUnavailableError, match="stopped"):
        engine.capture(group(engine, 1), plugged.features)
