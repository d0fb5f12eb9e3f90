"""Every finding of the doctor comes with its mend, and one that cannot be made hides no other."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import apsw
import huggingface_hub
import pytest

from paceline.c_compiler import Missing
from paceline.cli import plain
from paceline.cli.main import app
from paceline.config.load import load_run_config
from paceline.errors import PacelineError
from paceline.roles import doctor as module
from paceline.roles import examined_server
from paceline.roles.doctor import examine
from paceline.roles.engine_prober import probe
from paceline.roles.examined import Examined
from paceline.roles.machine import Gpu
from paceline.roles.question import ask
from paceline.roles.target_binding import bind_target
from paceline.roles.target_checker import check
from paceline.testing.ledger_calls import capture, producer_of
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun
from paceline.testing.valkey_server import ValkeyServer

LIBRARIES = {"versions": {"torch": "2.9.0"}, "cuda": "", "devices": [], "warnings": []}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(autouse=True)
def libraries_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_here(monkeypatch, LIBRARIES)
    monkeypatch.setattr(module, "gpus_of_the_driver", lambda: ())


def asked_here(monkeypatch: pytest.MonkeyPatch, libraries: dict[str, Any]) -> None:
    """Without processes; the libraries are those given."""

    def answered(asked: str, question: str, *_: object, **__: object) -> str:
        return json.dumps(libraries if asked == "paceline.roles.libraries" else check(question))

    monkeypatch.setattr(module, "ask", answered)


def found(run: TinyRun | None = None) -> list[Examined]:
    file = None if run is None else run.run_file
    return list(examine(None if file is None else load_run_config(file), file))


def bad(findings: list[Examined]) -> Examined:
    """The only one that is bad; it says what to do."""
    [one] = [finding for finding in findings if finding.state == "bad"]
    assert one.mend
    return one


def test_a_sound_machine_and_run_have_nothing_to_mend(model: Path, tmp_path: Path) -> None:
    """And nothing stays behind."""
    run = TinyRun(tmp_path / "run", model)
    before = sorted(tmp_path.rglob("*"))
    findings = found(run)
    assert [finding for finding in findings if finding.state == "bad"] == []
    topics = {finding.topic for finding in findings}
    of_machine = {"python", "libraries", "gpu", "ledger", "memory", "files", "disk", "ports"}
    assert topics == {*of_machine, "run", "target"}
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_missing_of_the_packages_is_asked_of_pip_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not Paceline itself, which no index has."""
    asked = ["no-such-package>=2,<3", "pytest>=999", "rich>=1", "redis>=8; extra == 'redis'"]
    monkeypatch.setattr(module, "requires", lambda _: asked)
    [one] = module.python_is_new_enough(None)
    assert "no-such-package is missing" in one.what
    assert one.mend == "pip install 'no-such-package<3,>=2' 'pytest>=999'"


def test_gpus_that_torch_cannot_use_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for processors, or a driver that is too old."""
    monkeypatch.setattr(module, "gpus_of_the_driver", lambda: (Gpu("NVIDIA L4", 24 << 30, 8.9, "535.1"),))
    one = bad(found())
    assert "1 x NVIDIA L4, driver 535.1, and torch for CPUs can use none" in one.what
    assert "torch build" in one.mend
    asked_here(monkeypatch, {**LIBRARIES, "cuda": "12.8", "devices": ["NVIDIA L4"]})
    assert "1 x NVIDIA L4, torch for CUDA 12.8" in [finding.what for finding in found()]


def test_a_machine_with_gpus_is_asked_for_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without them is not. Most runs compile nothing, so a lack is a note."""
    monkeypatch.setattr(module, "missing_for_triton", lambda: Missing("There is no gcc.", "Install it."))
    assert not list(module.kernels_could_be_compiled(None))
    monkeypatch.setattr(module, "gpus_of_the_driver", lambda: (Gpu("NVIDIA L4", 24 << 30, 8.9, "580.1"),))
    [one] = module.kernels_could_be_compiled(None)
    assert (one.state, one.mend) == ("note", "Install it.")
    monkeypatch.setattr(module, "missing_for_triton", lambda: None)
    [one] = module.kernels_could_be_compiled(None)
    assert one.state == "good"


def test_a_library_that_cannot_be_imported_hides_no_other_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:
        raise PacelineError("The import ended with 1.", next="repair it.")

    monkeypatch.setattr(module, "ask", broken)
    findings = found()
    assert bad(findings) == Examined(
        topic="libraries", state="bad", what="The import ended with 1.", mend="Repair it."
    )
    assert {"python", "disk", "ports"} <= {finding.topic for finding in findings}


def test_an_old_sqlite_is_refused_as_the_start_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.40.0")
    one = bad(found())
    assert "SQLite 3.40.0 may corrupt" in one.what
    assert "apsw" in one.mend


def test_a_server_that_may_lose_the_ledger_is_refused(model: Path, tmp_path: Path) -> None:
    """With the setting to change; one that is away, too; and nothing is written to one that is sound."""
    (folder := tmp_path / "server").mkdir()
    with ValkeyServer(folder, appendonly="no") as server:
        ledger = {"store": "redis", "url": server.url}
        run = TinyRun(tmp_path / "run", model, ledger=ledger)
        assert "CONFIG SET appendonly yes" in bad(found(run)).mend
        client = server.client()
        client.config_set("appendonly", "yes")
        findings = found(run)
        assert [finding.topic for finding in findings if finding.state == "bad"] == []
        assert client.dbsize() == 0
        client.close()
        server.kill()  # it does not end in good order while it writes its first append-only file


@pytest.mark.parametrize("took", [0.5, OSError(30, "Read-only file system", "/runs")])
def test_a_slow_or_broken_disk_is_told(monkeypatch: pytest.MonkeyPatch, took: float | OSError) -> None:
    def sync(_: Path) -> float:
        if isinstance(took, OSError):
            raise took
        return took

    monkeypatch.setattr(module, "_sync_s", sync)
    [one] = [finding for finding in found() if finding.topic == "disk"]
    assert one.mend
    assert ("a sync takes 500.0 ms" in one.what) or ("Read-only file system" in one.what)
    assert one.state == ("bad" if isinstance(took, OSError) else "note")


def test_timing_the_disk_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """It may be a run's; not even its time of change moves."""
    before = tmp_path.stat().st_mtime_ns
    assert module._sync_s(tmp_path) > 0
    assert (tmp_path.stat().st_mtime_ns, list(tmp_path.iterdir())) == (before, [])


class Served(BaseHTTPRequestHandler):
    """A vLLM server of some version, as far as the doctor asks."""

    version = "0.32.0"

    def do_GET(self) -> None:
        body = json.dumps({"version": self.version} if self.path == "/version" else {}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Served) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_engines_server_must_answer_and_know_how(
    model: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is too old, and one that is not there, are told apart."""
    target = {"model": str(model), "dtype": "bfloat16"}
    run = TinyRun(tmp_path / "run", model, engine={"name": "vllm", "url": url}, target=target)
    config = load_run_config(run.run_file)

    def server() -> Examined:
        [one] = examined_server.ports_can_be_opened(config)
        return one

    assert (server().state, server().what) == ("good", f"{url} answers, vllm 0.32.0")
    monkeypatch.setattr(Served, "version", "0.17.1")
    assert server().state == "bad"
    assert "0.18 or newer" in server().mend
    run.config["engine"]["url"] = "http://127.0.0.1:9"
    run.write()
    config = load_run_config(run.run_file)
    assert "does not answer" in server().what
    assert "paceline engine vllm" in server().mend


def test_a_managed_servers_program_tells_its_version(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = {"model": str(model), "dtype": "bfloat16"}
    run = TinyRun(tmp_path / "run", model, engine={"name": "vllm", "managed": True}, target=target)
    config = load_run_config(run.run_file)
    monkeypatch.setattr(examined_server.shutil, "which", lambda _: "/opt/vllm")
    for said, code, state in (("INFO ...\n0.32.0\n", 0, "good"), ("0.17.0", 0, "bad"), ("", 1, "bad")):
        told = subprocess.CompletedProcess([], code, said, "")
        monkeypatch.setattr(examined_server.subprocess, "run", lambda *_, told=told, **__: told)
        [one] = examined_server.the_servers_program_starts(config)
        assert one.state == state


def changed(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, **values}))

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (changed("config.json", model_type="zorg"), "not a configuration that transformers can read"),
        (changed("config.json", rope_parameters={"rope_type": "zorg"}), "KeyError: 'zorg'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
        (cut, "model.safetensors cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "ZeroDivisionError"),
        (changed("tokenizer_config.json", chat_template=7), "chat template"),
    ],
)
def test_a_target_that_a_start_refuses_is_told_by_the_doctor(
    model: Path, tmp_path: Path, harm: Callable[[Path], None], what: str
) -> None:
    run = TinyRun(tmp_path / "run", Path(shutil.copytree(model, tmp_path / "model")))
    if what == "chat template":
        (tmp_path / "model" / "chat_template.jinja").unlink()
    harm(tmp_path / "model")
    one = bad(found(run))
    assert (one.topic, what in one.what) == ("target", True), one


def test_a_target_of_the_hub_may_lack_its_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start fetches them. A sharded one's index is fetched with its configuration."""
    described = Path(shutil.copytree(model, tmp_path / "model"))
    weights = {f"w{number}": f"model-{number}.safetensors" for number in (1, 2)}
    (described / "model.safetensors").rename(described / weights["w1"])
    (described / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(described))
    run = TinyRun(tmp_path / "run", Path("org/model"))
    assert "the start fetches its weights" in check(str(run.run_file))
    (described / "model.safetensors.index.json").unlink()
    assert "the start fetches its weights" in check(str(run.run_file))


def test_another_target_than_the_runs_is_told_once_it_binds(model: Path, tmp_path: Path) -> None:
    """Before the first captured sample a start takes the new one."""
    run = TinyRun(tmp_path / "run", Path(shutil.copytree(model, tmp_path / "model")))
    config = load_run_config(run.run_file)
    ledger = config.open_ledger()
    bind_target(ledger, config)
    changed("generation_config.json", eos_token_id=[2, 7])(tmp_path / "model")
    assert [finding for finding in found(run) if finding.state == "bad"] == []
    capture(producer_of(ledger, prompts=1), 0)
    ledger.close()
    one = bad(found(run))
    assert "holds another model than the one this run was started with" in one.what


def test_a_probe_proves_the_engine_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    (memory := tmp_path / "memory").mkdir()
    run = TinyRun(tmp_path / "run", model, features={"directory": str(memory)})
    told = probe(str(run.run_file))
    assert (told["dtype"], told["device"]) == ("float32", "cpu")
    assert list(memory.iterdir()) == []
    assert not run.directory.exists()


def test_a_process_that_ends_without_an_answer_is_one_clear_error() -> None:
    with pytest.raises(PacelineError, match=r"The work ended with 1: .*No module named") as caught:
        ask("paceline.nothing", "", "work", threads=1)
    assert caught.value.next


def test_the_command_tells_people_and_programs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 80 columns, or as JSON; the exit code says whether something is bad."""
    monkeypatch.setattr(plain.out, "_width", 80)
    run = TinyRun(tmp_path / "run", model, features={"budget_mib": 1}, method={"first_samples": 200})
    assert app(["doctor", str(run.run_file)], standalone_mode=False) == 2
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("bad   run        features.budget_mib gives 1 MiB") for line in lines)
    assert any(line.startswith("           mend: Set features.budget_mib to") for line in lines)
    assert lines[-1] == "1 to mend"
    assert app(["doctor", str(run.run_file), "--json"], standalone_mode=False) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["version"], told["healthy"]) == (1, False)
    assert {"topic", "state", "what", "mend"} == told["findings"][0].keys()
    assert (app(["doctor"], standalone_mode=False) or 0) == 0
    assert capsys.readouterr().out.endswith("Nothing to mend.\n")
    assert app(["doctor", "--probe"], standalone_mode=False) == 2
    assert "next  paceline doctor RUN.yaml --probe" in capsys.readouterr().err
