"""Verbs on run directories that were tampered with: an answer or one of our errors, never a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.data.answers import Answer, AnswerFiles
from paceline.errors import StoreError
from paceline.testing.run_by_hand import RunByHand
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun

VERBS = ("status", "inspect", "fsck")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, closed."""
    run = RunByHand(tmp_path_factory.mktemp("run"))
    for _ in range(2):
        run.train(run.capture(2))
        run.checkpoint()
    run.ledger.close()
    return run.folder


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run"))


def told(*arguments: object) -> tuple[int, str]:
    """Exit code and output; anything but an answer or an error of ours fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert "an error that it does not know" not in result.output, result.output
    return result.exit_code, result.output


def replaced_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def replaced_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


HARMS = (replaced_by_fifo, replaced_by_folder, replaced_by_loop, replaced_by_device)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("harm", HARMS)
def test_a_ledger_that_is_no_file_is_an_error(run: Path, harm: Callable[[Path], None], verb: str) -> None:
    """Nothing waits for it, and nothing else is made in its place."""
    harm(run / "ledger.db")
    code, output = told(verb, run)
    assert code in (1, 2, 6), output
    assert "error" in output


def test_no_verb_makes_a_ledger_of_an_empty_file(run: Path) -> None:
    """Which fsck would then have called sound."""
    (run / "ledger.db").write_bytes(b"")
    for verb in ("status", "inspect", "evaluate"):
        code, output = told(verb, run)
        assert code == 2
        assert "has not begun" in output
    assert (run / "ledger.db").stat().st_size == 0


@pytest.mark.parametrize("harm", HARMS)
def test_a_checkpoint_file_that_is_none_is_damage(run: Path, harm: Callable[[Path], None]) -> None:
    """A FIFO in the place of a manifest or of weights does not hold up the checker."""
    for name, folder in zip(
        ("manifest.json", "weights.bin"), sorted((run / "checkpoints").iterdir()), strict=True
    ):
        harm(folder / name)
    code, output = told("fsck", run)
    assert code == 9
    assert output.count("ERROR checkpoint step-") == 2


def test_a_file_of_any_size_is_judged_without_reading_it(run: Path) -> None:
    """A sparse file costs an attacker nothing, and would cost the checker hours."""
    folders = sorted((run / "checkpoints").iterdir())
    os.truncate(folders[0] / "weights.bin", 1 << 40)
    os.truncate(folders[1] / "manifest.json", 1 << 40)
    code, output = told("fsck", run)
    assert code == 9
    assert "its size is not the recorded one" in output
    assert "more than" in output
    os.truncate(run / "ledger.db", 1 << 40)
    assert "says that it has" in told("fsck", run)[1]


@pytest.mark.parametrize(
    "content", [b"garbage", b"[]", b"{}", b'{"chain": 1}', b'{"chain": {}, "prompts": "x"}', b"[" * 100_000]
)
def test_an_evaluation_that_is_none_is_left_out(run: Path, content: bytes) -> None:
    """It is a file beside the run, and the run's state does not depend on it."""
    (run / "evaluation.json").write_bytes(content)
    code, output = told("status", run)
    assert code == 0
    assert "acceptance length" not in output


@pytest.mark.parametrize("harm", HARMS)
def test_telemetry_and_locks_that_are_no_files_are_left_out(run: Path, harm: Callable[[Path], None]) -> None:
    """status tells what the ledger knows."""
    (run / "events").mkdir()
    for name in ("events/consumer.jsonl", "evaluation.json", "producer.lock"):
        (run / name).touch()
        harm(run / name)
    assert told("status", run)[0] == 0


def test_events_of_wrong_types_are_left_out(run: Path) -> None:
    """They are for looking at, and anything may stand in them."""
    (run / "events").mkdir()
    big = "9" * 400
    (run / "events" / "consumer.jsonl").write_text(
        '{"event": "step", "step": {}, "loss": "x", "blocked_seconds": []}\n'
        f'{{"event": "step", "loss": {big}, "blocked_seconds": {big}}}\n'
        '{"event": ["step"]}\n{"event": "step", "loss": NaN, "step": 3}\n'
    )
    (run / "events" / "producer.jsonl").write_text('{"event": "group", "seconds": 1}\n')
    assert "last step  │ step 3" in told("status", run)[1]


def test_a_hostile_value_in_the_ledger_is_an_error_of_the_ledger(run: Path) -> None:
    """SQLite keeps any type in any column."""
    import apsw

    db = apsw.Connection(str(run / "ledger.db"))
    db.execute("UPDATE fact SET value = '[1, {' WHERE key = 'run_id'")
    db.close()
    code, output = told("status", run)
    assert code == 6
    assert "paceline fsck" in output


def test_an_id_cannot_command_the_terminal(tmp_path: Path) -> None:
    """Escape sequences, a bell, a newline that fakes a line of ours: all shown, none obeyed."""
    bad = "\x1b]0;owned\x07\x1b[2J\u202e\n" + "sound: no sample is lost"
    run = RunByHand(tmp_path)
    run.producer.lease(1)
    run.producer.fail([0], f"{bad}: {bad}", retryable=False)
    run.ledger.close()
    for arguments in (
        ("status", tmp_path),
        ("inspect", tmp_path),
        ("fsck", tmp_path),
        ("inspect", tmp_path, "--sample", bad),
        ("status", tmp_path / bad),
    ):
        output = told(*arguments)[1]
        assert "\\x1b]0;owned\\x07\\x1b[2J\\u202e" in output
        assert not {"\x1b", "\x07", "\u202e"} & set(output)
        assert "\nsound: no sample is lost\x1b" not in output


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000, "/dev/null/x", "a\0b"], ids=range(4))
@pytest.mark.parametrize("verb", [*VERBS, "train", "evaluate"])
def test_a_path_that_no_system_takes_is_an_error(path: str, verb: str) -> None:
    """Too long, below a file, with NUL in it."""
    code, output = told(verb, path)
    assert code in (1, 2)
    assert "error" in output


SMALL_PROCESS = """
import resource, sys
from paceline.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
sys.argv = ["paceline", *sys.argv[2:]]
main.main()
"""


@pytest.mark.parametrize("files", [6, 9, 12, 24])
def test_few_open_files_are_an_error_with_advice_or_enough(run: Path, files: int) -> None:
    """Never a traceback, whichever open fails."""
    for verb in VERBS:
        command = [sys.executable, "-c", SMALL_PROCESS, str(files), verb, str(run)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or "error" in done.stderr or "cannot be read" in done.stdout


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("> /dev/full", 1, "could not be written"),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("| head -c 1 > /dev/null", 0, ""),
    ],
)
def test_output_that_goes_nowhere_is_told_in_one_sentence_or_not_at_all(
    run: Path, redirection: str, code: int, said: str
) -> None:
    """A full device, a closed stream, a reader that has gone away."""
    script = f"{sys.executable} -m paceline.cli.main status {run} {redirection}"
    done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)


def test_a_reader_that_went_away_is_told_by_the_exit_code_alone(run: Path) -> None:
    """As of a process that SIGPIPE ends."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "paceline.cli.main", "status", str(run)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_only_debug_shows_a_traceback(tmp_path: Path) -> None:
    """Beside the same message and exit code."""
    command = [sys.executable, "-m", "paceline.cli.main"]
    plainly, debug = (
        subprocess.run(
            [*command, *flags, "status", str(tmp_path)], capture_output=True, text=True, check=False
        )
        for flags in ([], ["--debug"])
    )
    assert plainly.returncode == debug.returncode == 2
    assert "Traceback" not in plainly.stderr
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(plainly.stderr)


def test_an_older_ledger_is_told_from_damaged_checkpoints(tmp_path: Path) -> None:
    """Newer checkpoints lie there whole: it is the ledger that must be restored."""
    run = RunByHand(tmp_path)
    run.train(run.capture(2))
    run.checkpoint(keep=1)
    shutil.copy(tmp_path / "ledger.db", tmp_path / "backup.db")
    shutil.copy(tmp_path / "ledger.db-wal", tmp_path / "backup.db-wal")
    for _ in range(2):
        run.train(run.capture(2))
        run.checkpoint(keep=1)
    run.ledger.close()
    [newest] = (tmp_path / "checkpoints").iterdir()
    for suffix in ("", "-wal"):
        (tmp_path / f"backup.db{suffix}").rename(tmp_path / f"ledger.db{suffix}")
    code, output = told("fsck", tmp_path)
    assert code == 9
    assert "older than its checkpoints" in output
    assert output.count(newest.name) >= 2
    assert f"of later steps than the ledger knows: {newest.name}" in told("status", tmp_path)[1]


def without_privileges(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A verb run by a root that may do no more than any user."""
    setpriv = shutil.which("setpriv")
    if setpriv is None or os.geteuid() != 0:
        pytest.skip("needs root and setpriv(1)")
    command = [setpriv, "--inh-caps=-all", "--bounding-set=-all", sys.executable, "-m", "paceline.cli.main"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def given_to_another_user(path: Path, mode: int) -> None:
    for entry in (path, *path.rglob("*")):
        entry.chmod(mode | (0o111 & (mode >> 2) if entry.is_dir() else 0))
        os.chown(entry, 65534, 65534)


def test_what_a_user_may_not_read_is_neither_sound_nor_damaged(run: Path) -> None:
    """fsck says so; and checks what it may only read."""
    given_to_another_user(run, 0o644)
    for verb in VERBS:
        assert without_privileges(verb, str(run)).returncode == 0
    given_to_another_user(run / "checkpoints", 0o600)
    done = without_privileges("fsck", str(run))
    assert done.returncode == 2
    assert "run the command as the user of the run" in done.stderr
    given_to_another_user(run, 0o600)
    for verb in VERBS:
        done = without_privileges(verb, str(run))
        assert done.returncode == 1
        assert "Permission denied" in done.stderr


def test_another_users_slots_are_not_looked_at(run: Path, tmp_path: Path) -> None:
    """Its name can be foretold, so anybody may have made that folder before, with FIFOs for slots."""
    folder = tmp_path / "paceline-run0"
    folder.mkdir()
    os.mkfifo(folder / "slot-00000001")
    from paceline.fsck.checker import check

    assert not check(run, features=folder).errors
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        assert any("belongs to another user" in note for note in check(run, features=folder).notes)


@pytest.mark.parametrize("name", ["evaluations.jsonl", "checkpoints/best"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_curve_or_held_drafts_that_are_none_are_left_out(
    run: Path, harm: Callable[[Path], None], name: str
) -> None:
    """They lie beside the run; nothing waits for what is in their place."""
    (run / name).touch()
    harm(run / name)
    for verb in VERBS:
        assert told(verb, run)[0] == 0


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run file with a target of its own."""
    folder = tmp_path_factory.mktemp("planned")
    return TinyRun(folder, make_tiny_folder(folder / "model"))


@pytest.mark.parametrize("harm", HARMS)
def test_an_index_or_a_tokenizer_that_is_no_file_does_not_hold_up_the_plan(
    planned: TinyRun, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    """The data is scanned again, and characters are counted instead of tokens."""
    run = TinyRun(tmp_path, Path(shutil.copytree(planned.folder / "model", tmp_path / "model")))
    run.directory.mkdir()
    for path in (run.directory / "prompts.index.json", tmp_path / "model" / "tokenizer.json"):
        path.touch()
        harm(path)
    code, output = told("plan", run.run_file)
    assert code == 0, output


@pytest.mark.parametrize("harm", HARMS)
def test_answers_that_are_no_file_are_an_error_for_every_reader(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    """One that looks for an answer, reads all of them for their export, or writes another one."""
    answer = Answer(3, "0/a", (5, 6, 7), ((1, 3),))
    AnswerFiles(tmp_path).keep([answer])
    [path] = tmp_path.glob("*.answers")
    harm(path)
    for use in (
        lambda files: files.get(3),
        lambda files: list(files.all()),
        lambda files: files.digests(lambda _: True),
        lambda files: files.keep([answer]),
    ):
        with pytest.raises(StoreError, match="check that disk"):
            use(AnswerFiles(tmp_path))
