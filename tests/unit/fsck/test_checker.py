"""The checker: sound runs pass, and every broken promise is found by its rule."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import apsw
import pytest
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.fsck.checker import Report, check
from paceline.testing.light_run import LightRun, RunShape

SHAPE = RunShape(prompts=20, group=4, batch=3, passes=2, interval=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run: most of its history folded, two checkpoints kept."""
    run = LightRun(tmp_path_factory.mktemp("finished"), SHAPE)
    run.produce()
    run.consume()
    return run.folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to be harmed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def sql(run: Path, *statements: str) -> None:
    db = apsw.Connection(str(run / "ledger.db"))
    for statement in statements:
        db.execute(statement)
        assert db.changes(), f"{statement} changed nothing"
    db.close()


def one(run: Path, query: str) -> object:
    db = apsw.Connection(str(run / "ledger.db"))
    value = next(iter(db.execute(query)))[0]
    db.close()
    return value


def test_a_finished_run_is_sound(finished: Path) -> None:
    """Everything is counted, folded history included."""
    report = check(finished)
    assert report.errors == []
    assert (report.counts["samples"], report.counts["steps"], report.counts["head_step"]) == (20, 14, 14)
    assert report.counts["folded_samples"] > 0


def test_a_run_in_flight_is_sound(tmp_path: Path) -> None:
    """Captured and not trained; then trained a little, with acks that no checkpoint covers."""
    light = LightRun(tmp_path, replace(SHAPE, interval=100))
    light.produce()
    assert check(tmp_path).errors == []

    class StoppedError(Exception):
        pass

    def stop(event: str, **fields: object) -> None:
        if event == "step" and fields["step"] == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        light.consume(stop)
    assert check(tmp_path).errors == []
    assert check(tmp_path).counts["head_step"] == 0


def test_a_run_with_losses_is_sound(tmp_path: Path) -> None:
    """Lost features, quarantine and a failed prompt are told, and break no promise."""
    light = LightRun(tmp_path, SHAPE)
    light.produce()
    store = light.open_store()
    store.report_lost(["light:7"])
    store.quarantine(["light:8"], step=None, reason="damaged")
    store.close()
    report = check(tmp_path)
    assert report.errors == []
    assert any("light:7" in note for note in report.notes)
    assert any("light:8: damaged" in note for note in report.notes)


LIVE = "(SELECT max(seq) FROM sample)"


def harm_folded(kind: str, change: Callable[[list[object]], object]) -> Callable[[Path], None]:
    """Rewrite the first folded block of a kind, digest and all."""

    def harm(run: Path) -> None:
        db = apsw.Connection(str(run / "ledger.db"))
        first, content = next(
            iter(db.execute("SELECT first, content FROM folded WHERE kind = ? ORDER BY first", (kind,)))
        )
        block = json.loads(lzma.decompress(content))
        change(block)
        data = json.dumps(block).encode()
        db.execute(
            "UPDATE folded SET content = ?, digest = ? WHERE kind = ? AND first = ?",
            (lzma.compress(data), sha256(data).hexdigest(), kind, first),
        )
        db.close()

    return harm


def statement(*statements: str) -> Callable[[Path], None]:
    return lambda run: sql(run, *statements)


def head_file(run: Path, name: str) -> Path:
    return run / "checkpoints" / str(one(run, "SELECT name FROM checkpoint ORDER BY step DESC")) / name


def flip(run: Path, name: str) -> None:
    path = head_file(run, name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def plan_without_its_last(run: Path) -> None:
    ids = json.loads(str(one(run, "SELECT sample_ids FROM plan ORDER BY step DESC")))
    sql(
        run,
        f"UPDATE plan SET sample_ids = '{json.dumps(ids[:-1])}' WHERE step = (SELECT max(step) FROM plan)",
    )


HARMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a commit is lost": ("C8", statement(f"DELETE FROM sample WHERE seq = {LIVE}")),
    "a step's plan changed": ("C3", plan_without_its_last),
    "a step was trained twice": (
        "C2",
        harm_folded("steps", lambda block: block[1].__setitem__(3, block[0][3])),  # type: ignore[index]
    ),
    "a folded step is gone": ("C4", harm_folded("steps", lambda block: block.pop(1))),
    "steps were swapped": (
        "C3",
        harm_folded("steps", lambda b: (b[0].__setitem__(3, b[1][3]), b[1].__setitem__(3, b[0][3]))),  # type: ignore[index]
    ),
    "a durable ack is gone": ("C1", statement("DELETE FROM ack WHERE step = (SELECT max(step) FROM ack)")),
    "an ack is of another step": ("C1", statement("UPDATE ack SET step = step - 1 WHERE step = 14")),
    "an ack is of nobody": ("C1", statement("INSERT INTO ack VALUES ('light:99', 3, 1)")),
    "an ack is durable beyond the head": ("C1", statement("UPDATE ack SET step = 99 WHERE step = 14")),
    "features freed too early": (
        "C1",
        statement(f"DELETE FROM ack WHERE sample_id = (SELECT sample_id FROM sample WHERE seq = {LIVE})"),
    ),
    "a trained sample is waited for": (
        "C1",
        statement(f"UPDATE sample SET state = 'lost' WHERE seq = {LIVE}"),
    ),
    "quarantine without a reason": (
        "C1",
        statement(f"UPDATE sample SET state = 'quarantined' WHERE seq = {LIVE}"),
    ),
    "a chain was edited": ("C3", statement("UPDATE checkpoint SET chain = 'f00' || chain")),
    "a head of another manifest": ("C5", statement("UPDATE checkpoint SET manifest_digest = 'f00'")),
    "a weight's bit flipped": ("C5", lambda run: flip(run, "weights.bin")),
    "a manifest's bit flipped": ("C5", lambda run: flip(run, "manifest.json")),
    "a checkpoint's file is gone": ("C5", lambda run: head_file(run, "weights.bin").unlink()),
    "the head's folder is gone": ("C5", lambda run: shutil.rmtree(head_file(run, "weights.bin").parent)),
    "a folded block's bit flipped": (
        "C8",
        statement("UPDATE folded SET content = substr(content, 1, 70) || x'00' || substr(content, 72)"),
    ),
    "the log's counter is off": ("C8", statement("UPDATE run SET last_seq = last_seq + 1")),
    "the prompts' counter is off": ("C8", statement("UPDATE run SET num_tasks = num_tasks + 1")),
    "a generation will be used again": ("C9", statement("UPDATE run SET next_generation = 3")),
    "committed bytes are promised": (
        "C9",
        statement(f"INSERT INTO intent SELECT generation, sample_id, 1 FROM sample WHERE seq = {LIVE}"),
    ),
    "a step is acked that was never planned": ("C4", statement("UPDATE run SET trained_step = 77")),
    "no database": ("C8", lambda run: (run / "ledger.db").write_bytes(b"x" * 5000) and None),
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_harm_is_found(run: Path, harm: str) -> None:
    """By the rule that names it; others may speak up as well."""
    rule, do = HARMS[harm]
    do(run)
    report: Report = check(run)
    assert any(error.startswith(rule) for error in report.errors), report.errors


def test_it_never_writes(run: Path) -> None:
    """Neither the ledger nor the checkpoints change by being looked at."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    check(run)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if not path.name.endswith("-shm")} == {
        path: data for path, data in before.items() if not path.name.endswith("-shm")
    }


def test_fsck_says_sound_or_unsound(run: Path) -> None:
    """A readable verdict and an exit code, also of a run that nobody can open."""
    good = CliRunner().invoke(app, ["fsck", str(run)])
    assert (good.exit_code, "sound: nothing lost" in good.output) == (0, True)
    flip(run, "weights.bin")
    bad = CliRunner().invoke(app, ["fsck", str(run)])
    assert bad.exit_code == 9
    assert "weights.bin is damaged" in bad.output
    assert "UNSOUND: 1 errors" in bad.output
    (run / "ledger.db").write_bytes(b"")
    assert CliRunner().invoke(app, ["fsck", str(run)]).exit_code == 9


def test_inspect_tells_a_steps_samples_and_a_samples_life(finished: Path) -> None:
    """From the ledger alone, folded history included."""

    def inspect(*options: str) -> str:
        result = CliRunner().invoke(app, ["inspect", str(finished), *options])
        assert result.exit_code == 0, result.output
        return result.output

    assert "step 1: durable, 3 samples" in inspect("--step", "1")
    assert "1  light:0  trained, last by step" in inspect("--step", "1")
    life = inspect("--sample", "light:0")
    assert "sample light:0 (prompt 0), place 1 in the log" in life
    assert life.count("visited by step") == SHAPE.passes
    assert "durable; features freed" in life
    assert inspect("--sample", "0") == life
    assert "20 samples committed, step 14 acked" in inspect()


def test_inspect_tells_what_was_set_aside_and_why(tmp_path: Path) -> None:
    """Quarantined samples and failed prompts are listed with their reasons; the unknown is an error."""
    light = LightRun(tmp_path, SHAPE)
    light.produce()
    store = light.open_store()
    store.quarantine(["light:8"], step=None, reason="loss is nan")
    store.add_tasks([*map(str, range(20)), "bad"])
    store.lease_tasks("w", 1)
    store.fail_tasks("w", ["bad"], reason="no text", attempt_max=None)
    store.close()
    everything = CliRunner().invoke(app, ["inspect", str(tmp_path)]).output
    assert "quarantined light:8: loss is nan" in everything
    assert "failed prompt bad: no text" in everything
    failed = CliRunner().invoke(app, ["inspect", str(tmp_path), "--sample", "light:bad"]).output
    assert "prompt bad: never committed; set aside: no text" in failed
    unknown = CliRunner().invoke(app, ["inspect", str(tmp_path), "--sample", "nobody"])
    assert unknown.exit_code == 2
    assert CliRunner().invoke(app, ["inspect", str(tmp_path), "--step", "9"]).exit_code == 2
