"""SGLang's plug-in, on stand-ins for the parts of the server that it hooks. It has not run on a GPU."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from paceline.engines.hooks import Hooks
from paceline.engines.sglang import sink
from paceline.testing.sglang_stand_in import Misfit, Req, StandIn
from paceline.testing.tiny_folder import make_tiny_folder

BLOCKS = (1, 4, 7)
LAST = 8
PROMPTS = ([5, 6, 7, 8, 9], [10, 11], [3, 4, 5, 6, 7, 8, 12])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(sink.FOLDER_VARIABLE, str(tmp_path / "sink"))
    return tmp_path / "sink"


def rid(number: int) -> str:
    return f"paceline-{number:032x}"


def requests(count: int = 3) -> list[Req]:
    return [Req(rid(i), prompt, max_new_tokens=3 + 2 * i) for i, prompt in enumerate(PROMPTS[:count])]


@contextmanager
def served(folder: Path, misfit: Misfit | None = None) -> Iterator[StandIn]:
    server = StandIn(folder, BLOCKS, misfit)
    with server.plugged():
        server.start()
        yield server
        server.flush()


def manifest_of(place: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((place / f"{name}.json").read_bytes())
    return found


def written(place: Path, name: str) -> tuple[list[int], torch.Tensor]:
    manifest = manifest_of(place, name)
    assert "error" not in manifest, manifest
    data = (place / f"{name}.safetensors").read_bytes()
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["bytes"] == len(data)
    tensors = load(data)
    return tensors[sink.TOKENS].tolist(), tensors[sink.STATES]


def own_states(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode(), Hooks(model.model.layers, [*BLOCKS, LAST]) as hooks:
        model.model(input_ids=torch.tensor([tokens]), use_cache=False)
    return torch.cat([hooks.taken[k][0] for k in (*BLOCKS, LAST)], dim=-1)


def test_each_request_of_a_batch_gets_its_own_states(folder: Path, place: Path) -> None:
    """Blocks in ascending order, then the last before the final norm; the last token has no state."""
    batch = requests()
    with served(folder) as server:
        server.serve(batch)
        server.flush()
    for number, req in enumerate(batch):
        tokens, states = written(place, rid(number))
        assert tokens == [*PROMPTS[number], *req.output_ids]
        torch.testing.assert_close(states, own_states(folder, tokens[:-1]), atol=1e-4, rtol=1e-4)
        assert manifest_of(place, rid(number))["blocks"] == list(BLOCKS)
        assert req.hidden_states == []


def test_a_prompt_in_chunks_and_one_that_is_begun_anew_are_whole(folder: Path, place: Path) -> None:
    """The server itself drops the rows of all chunks but the last, and doubles those of a second start."""
    for misfit in (Misfit(chunk=2), Misfit(retract_after=2)):
        batch = requests()
        with served(folder, misfit) as server:
            server.serve(batch)
            server.flush()
        for number in range(3):
            tokens, states = written(place, rid(number))
            torch.testing.assert_close(states, own_states(folder, tokens[:-1]), atol=1e-4, rtol=1e-4)


def test_a_cached_prefix_is_told_instead_of_states(folder: Path, place: Path) -> None:
    """Cached tokens have no states; the manifest says so, and no tensors are left."""
    with served(folder, Misfit(cached=1)) as server:
        server.serve(requests(1))
        server.flush()
    assert manifest_of(place, rid(0))["error"] == "SinkError: the server computed 6 states for 8 tokens"
    assert not (place / f"{rid(0)}.safetensors").exists()


def test_a_norm_that_the_sink_does_not_see_gives_no_last_state(folder: Path, place: Path) -> None:
    """The rows are narrower then, which the producer refuses; a wrong state is never written."""
    with served(folder, Misfit(norm_elsewhere=True)) as server:
        server.serve(requests(1))
        server.flush()
    assert written(place, rid(0))[1].shape[-1] == len(BLOCKS) * 32


def test_the_blocks_are_those_that_the_model_itself_counts(folder: Path, place: Path) -> None:
    """A family that takes the ids for other blocks is found out."""
    with served(folder, Misfit(shift=-1)) as server:
        server.serve(requests(1))
        server.flush()
    assert manifest_of(place, rid(0))["blocks"] == [0, 3, 6]


def test_others_requests_are_answered_as_before(folder: Path, place: Path) -> None:
    """Only ids of the producer's, which ask for states, take part."""
    names = ("health", "paceline-1", rid(1).upper())
    batch = [Req(name, PROMPTS[0], max_new_tokens=2) for name in names]
    silent = Req(rid(2), PROMPTS[0], max_new_tokens=2, return_hidden_states=False)
    with served(folder) as server:
        server.serve([*batch, silent])
        server.flush()
    assert list(place.iterdir()) == []
    assert all(len(req.hidden_states) == 2 for req in batch)


def test_a_repeated_request_overwrites_its_file(folder: Path, place: Path) -> None:
    """The client chose the name, so nothing is left that nobody knows."""
    with served(folder) as server:
        for prompt in (PROMPTS[0], PROMPTS[2]):
            server.serve([Req(rid(0), prompt, max_new_tokens=1)])
        server.flush()
    assert sorted(path.name for path in place.iterdir()) == [f"{rid(0)}.json", f"{rid(0)}.safetensors"]
    assert written(place, rid(0))[0][:-1] == PROMPTS[2]


def test_an_ended_request_leaves_nothing_behind(folder: Path, place: Path) -> None:
    """A folder that has gone costs a file, not the server."""
    with served(folder) as server:
        place.rmdir()
        server.serve(requests(1))
        server.flush()
        place.mkdir(mode=0o700)
        server.serve([Req(rid(3), PROMPTS[0], max_new_tokens=1)])
        server.flush()
    assert written(place, rid(3))[0][:-1] == PROMPTS[0]


def test_without_the_variable_the_plug_in_does_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any server of the machine may find the package installed."""
    monkeypatch.delenv(sink.FOLDER_VARIABLE, raising=False)
    assert sink.register() is None


def test_an_sglang_of_other_functions_is_refused(folder: Path, place: Path) -> None:
    """At its start, by name: a hook that is never called would look like a server without states."""
    server = StandIn(folder, BLOCKS)
    vars(server.modules[sink._NORM])["final_norm"] = lambda hidden_states, norm: None
    with pytest.raises(sink.SinkError, match="final_norm takes no forward_batch"), server.plugged():
        pass


def test_a_folder_that_others_may_write_to_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user could put states there."""
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    monkeypatch.setenv(sink.FOLDER_VARIABLE, str(open_folder))
    with pytest.raises(sink.SinkError, match="others may write"):
        sink.register()


def test_the_plug_in_needs_nothing_of_paceline_but_itself() -> None:
    """The server's environment has the package alone, without what the rest of it needs."""
    code = (
        "import sys; from paceline.engines.sglang import sink; "
        "print(sorted(name for name in sys.modules if name.split('.')[0] in "
        "('paceline', 'sglang', 'pydantic', 'msgspec', 'apsw', 'transformers')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = ["paceline", "paceline.engines", "paceline.engines.sglang", "paceline.engines.sglang.sink"]
    assert found.strip() == str(names)


def test_sglang_finds_the_plug_in_where_the_package_declares_it() -> None:
    """By the entry point in pyproject.toml."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    [where] = project["entry-points"]["sglang.srt.plugins"].values()
    assert where == f"{sink.register.__module__}:{sink.register.__qualname__}"
