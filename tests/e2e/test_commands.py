"""The command line on a tiny real model: the whole way, and every mistake a user can make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from paceline.config.load import load_run_config
from paceline.evaluation.marked import read_marked
from paceline.ledger.locks import live_holder
from paceline.monitoring.texts import RunTexts
from paceline.telemetry import read_events
from paceline.testing.forked_commands import ForkedCommands
from paceline.testing.tiny_run import TinyRun


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run that `paceline train` took to the end."""
    run = TinyRun(tmp_path_factory.mktemp("run"), tiny_model)
    result = run.command("train")
    assert result.returncode == 0, result.stderr
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("acceptance length ")
    assert last.endswith("over plain decoding | 40 samples trained | 0 restarts")
    return run


def test_train_trains_every_sample_and_leaves_no_feature(finished: TinyRun) -> None:
    """Both roles, to the end: 40 samples durable, shared memory given back."""
    ledger = finished.ledger()
    assert durable(finished) == 40
    assert ledger.facts()["completed_step"] == 10
    assert ledger.snapshot().usage.resident_samples == 0
    assert not load_run_config(finished.run_file).feature_folder.exists()


COMES_LATE = """
import sys
from pathlib import Path
from paceline.engines.transformers import TransformersEngine
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles import producer
from paceline.roles.process import run_role

load = TransformersEngine.probe

def completed_meanwhile(engine):
    load(engine)
    ledger = SQLiteLedger(sys.argv[2])
    ledger.set_facts(None, {"completed_step": 10})
    ledger.close()

TransformersEngine.probe = completed_meanwhile
sys.exit(run_role("producer", Path(sys.argv[1]), producer.produce))
"""


def test_a_producer_that_comes_when_all_is_trained_leaves_no_feature_store(
    tiny_model: Path, tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    """It was started again at the very end, and still loaded its model when the consumer freed everything."""
    run = TinyRun(tmp_path, tiny_model)
    done = forked_commands.script(COMES_LATE, str(run.run_file), str(run.directory / "ledger.db"))
    assert done.returncode == 0, done.stderr
    assert not load_run_config(run.run_file).feature_folder.exists()


def test_both_sides_tell_how_long_they_were_blocked(finished: TinyRun) -> None:
    """With every group and every step: the sum so far of their process."""
    for role, work in (("producer", "group"), ("consumer", "step")):
        events = read_events(finished.directory / "events" / f"{role}.jsonl")
        sums = [event["blocked_seconds"] for event in events if event["event"] == work]
        assert sums == sorted(sums)
        assert sums
    assert sums[-1] > 0, "the consumer waits while the target is loaded"


def test_evaluation_is_lossless(finished: TinyRun) -> None:
    """Every held-out prompt's speculative output equals plain decoding token for token."""
    report = json.loads((finished.directory / "evaluation.json").read_text())
    assert report["identical"] == report["prompts"] == 3
    assert report["acceptance_length"] >= 1.0
    assert report["chain"]["identical"] == 3
    assert len(report["acceptance_rate"]) == 2


def test_the_measured_answers_are_kept_with_the_drafts_tokens(finished: TinyRun) -> None:
    """They are the target's own in every way of guessing, and their counts are the report's figures."""
    report = json.loads((finished.directory / "evaluation.json").read_text())
    marked = read_marked(finished.directory, finished.ledger().facts())
    assert marked is not None
    assert marked.step == 10
    tree, chain = marked.ways["tree"], marked.ways["chain"]
    assert [answer.token_ids for answer in tree] == [answer.token_ids for answer in chain]
    for answers, way in ((tree, report), (chain, report["chain"])):
        accepted, cycles = (sum(getattr(one, name) for one in answers) for name in ("accepted", "cycles"))
        assert way["acceptance_length"] == 1 + accepted / max(1, cycles)
        drafted = sum(stop - start for one in answers for start, stop in one.drafted)
        written = sum(len(one.token_ids) - one.prompt_tokens for one in answers)
        assert drafted <= accepted
        assert cycles <= written - drafted <= cycles + len(answers), "a last cycle may be cut short"


def test_a_training_samples_answer_is_marked_on_request(finished: TinyRun) -> None:
    """By the prompt's id, in all its rounds; the sample's text tells it, and the report of before stays."""
    before = (finished.directory / "evaluation.json").read_bytes()
    result = finished.run([*finished.arguments("evaluate"), "--sample", "t3"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the draft of step 10, a tree of 4, guesses ") == 2
    facts = finished.ledger().facts()
    text = RunTexts(finished.directory).of_sample(3, facts)
    assert text is not None
    assert text.drafted.startswith("the draft of step 10")
    assert any(piece.is_drafted for piece in text.pieces) == ("guesses 0" not in text.drafted)
    assert (finished.directory / "evaluation.json").read_bytes() == before
    unknown = finished.run([*finished.arguments("evaluate"), "--sample", "no such"])
    assert unknown.returncode == 2
    assert "was ever committed" in unknown.stderr


def test_status_and_evaluate_take_the_run_file_or_the_directory(finished: TinyRun) -> None:
    """A run can be named by either."""
    by_file = finished.command("status")
    assert "40 committed, 40 trained" in by_file.stdout
    finished.run_file, run_file = finished.directory, finished.run_file
    by_directory, evaluated = finished.command("status"), finished.command("evaluate")
    finished.run_file = run_file
    assert by_directory.stdout == by_file.stdout
    assert evaluated.stdout.strip().splitlines()[-1].startswith("acceptance length")


def test_evaluate_measures_a_suite_beside_prompt_lookup(finished: TinyRun, tmp_path: Path) -> None:
    """Table and verdict on the screen; the report, every prompt in it, and its picture as files."""
    suite, report = tmp_path / "suite.jsonl", tmp_path / "report.json"
    lines = [{"id": c + n, "prompt": f"go {n} go {n}", "category": c} for c in "ab" for n in "xy"]
    suite.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = (finished.directory / "evaluation.json").read_bytes()
    options = ["--suite", str(suite), "--temperature", "0,1", "--json", str(report)]
    result = finished.run([*finished.arguments("evaluate"), *options])
    assert result.returncode == 0, result.stderr
    greedy, sampled = json.loads(report.read_text())["suites"]
    assert [group["category"] for group in greedy["groups"]] == ["all", "a", "b"]
    assert [each["prompt_id"] for each in sampled["prompts"]] == ["ax", "ay", "bx", "by"]
    assert greedy["groups"][0]["ways"]["tree"]["identical"] == 4
    assert "prompt lookup" in result.stdout
    assert report.with_suffix(".svg").read_text().startswith("<svg")
    assert (finished.directory / "evaluation.json").read_bytes() == before
    assert not (finished.directory / "evaluation-unfinished.jsonl").exists()


def test_a_changed_setting_is_refused_with_a_diff(finished: TinyRun, tmp_path: Path) -> None:
    """The run is untouched, and the message names both values."""
    changed = TinyRun(
        tmp_path,
        Path(finished.config["target"]["model"]),
        run=finished.config["run"],
        prompts=finished.config["prompts"],
        evaluation=finished.config["evaluation"],
        training={"learning_rate": 0.5},
    )
    result = changed.command("train")
    assert result.returncode == 2
    assert "training.learning_rate: 0.001 -> 0.5" in result.stderr


def test_an_edited_prompt_file_is_refused(finished: TinyRun) -> None:
    """Samples are known by their place in the file."""
    path = finished.folder / "train.jsonl"
    before = path.read_text()
    path.write_text('{"id": "new", "prompt": "one more"}\n' + before)
    result = finished.command("train")
    path.write_text(before)
    assert result.returncode == 2
    assert "not those that this run was started with" in result.stderr


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"target": {"model": "no/such/model"}}, "make model"),
        ({"prompts": {"path": "no/such/prompts.jsonl"}}, "cannot be read"),
        ({"features": {"budget_mib": 1}, "capture": {"group_size": 64}}, "set features.budget_mib to"),
        ({"training": {"batch_sise": 4}}, "did you mean 'batch_size'"),
        ({"prompts": {"max_prompt_tokens": 3}}, "data.max_prompt_tokens"),
    ],
)
def test_bad_input_is_one_clear_error(
    tiny_model: Path, tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    """What, why and the next command; no traceback; the exit code says what kind."""
    run = TinyRun(tmp_path, tiny_model)
    for name, values in sections.items():
        sections[name] = {**run.config.get(name, {}), **values}
    result = TinyRun(tmp_path, tiny_model, **sections).command("train")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_broken_prompt_line_fails_and_the_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    """Said at the start, durable with file and line as its reason, listed, and nothing else is missing."""
    run = TinyRun(tmp_path, tiny_model)
    path = tmp_path / "train.jsonl"
    bad = b'{"prompt": \n{"id": "half", "prompt": "\\ud800"}\n{"id": "x", "prompt": "\xff"}\n'
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n" + bad, 1))
    result = run.command("train")
    assert result.returncode == 0, result.stderr
    assert f"3 of 23 prompts fail, the first: {path}, line 2: it is not JSON" in result.stdout
    assert "40 samples trained" in result.stdout
    assert durable(run) == 40
    failed = [reason.partition(":")[0] for reason in run.ledger().failed().values()]
    assert failed == [f"{turn}/unreadable-line-{line}" for turn in (0, 1) for line in (2, 3, 4)]
    for command in ("status", "inspect"):
        listed = run.command(command).stdout
        assert f"failed prompt 1/unreadable-line-3: {path}, line 3: its prompt cannot be encoded" in listed


def test_a_second_trainer_is_refused_and_disturbs_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """While one consumer lives, another start of the role ends at once, naming it."""
    run = TinyRun(tmp_path, tiny_model)
    with run.start("consume") as first:
        _wait_until(lambda: "consumer" in _epochs(run))
        second = run.command("consume")
        assert second.returncode == 3
        assert f"process {first.pid}" in second.stderr
        assert "paceline status" in second.stderr
        assert run.command("produce").returncode == 0
        assert first.wait(timeout=500) == 0
    assert run.ledger().facts()["completed_step"] == 10


ODD = "a 'b' \"c\" ü 漢 🚲 $x -- " + "long " * 30  # a folder's name


def test_odd_surroundings_change_no_bit_and_a_second_start_is_refused(
    finished: TinyRun, tmp_path: Path
) -> None:
    """No environment, no locale, no stdin, asserts off, private files, an odd folder behind a link.

    All of it is started from nothing, imports included; the commands of other tests are forks.
    """
    (tmp_path / "there" / ODD).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there" / ODD)
    odd = TinyRun(
        tmp_path / "link",
        Path(finished.config["target"]["model"]),
        run={"name": finished.config["run"]["name"]},
    )
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "LC_ALL": "C", "PYTHONOPTIMIZE": "2"}
    script = 'umask 077; exec "$@" <&-'

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", *odd.arguments("train")],
            env=environment,
            cwd="/",
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    with start() as first:
        _wait_until(lambda: live_holder(odd.directory, "supervisor") is not None)
        with start() as second:
            _, said = second.communicate()
        assert second.returncode == 3, said
        assert "is already running (process" in said
        out, err = first.communicate()
    assert first.returncode == 0, err
    assert "40 samples trained | 0 restarts" in out
    weights = finished.final_weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in odd.final_weights().items())


def test_an_end_of_the_command_while_it_measures_does_not_keep_the_next_one_out(finished: TinyRun) -> None:
    """Killed, or by `paceline stop`: the evaluator ends, too, and the same command measures from the start.

    The finished run is not trained again: no weight and no count changes.
    """
    weights = (finished.directory / "checkpoints").stat().st_mtime_ns
    events = finished.directory / "events" / "evaluator.jsonl"
    pids = []
    for code in (-9, 130):
        events.unlink(missing_ok=True)
        with finished.start("train") as command:
            _wait_until(lambda: any(event["event"] == "role_started" for event in read_events(events)))
            pids += [event["pid"] for event in read_events(events) if event["event"] == "role_started"]
            if code == -signal.SIGKILL:
                command.kill()
            else:
                assert "stopping the evaluator" in finished.command("stop").stdout
            command.communicate()
        assert command.returncode == code
    again = finished.command("train")
    assert again.returncode == 0, again.stderr
    assert "40 samples trained | 0 restarts" in again.stdout
    assert live_holder(finished.directory, "evaluator") is None
    assert len(pids) == 2
    # Its lock is free a moment before it is gone.
    _wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert (finished.directory / "checkpoints").stat().st_mtime_ns == weights


ON_SMALL_MEMORY = """
import os, sys
from pathlib import Path
from paceline.testing.small_disk import mount_small_disk
folder, *command = sys.argv[1:]
try:
    mount_small_disk(Path(folder), 200 << 10)
except OSError:
    sys.exit(99)
os.execve(sys.executable, command, dict(os.environ))
"""


def test_full_shared_memory_loses_nothing(
    tiny_model: Path, tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    """The producer says what is full and what to do; with room the same run goes to its end.

    The full memory is a small tmpfs in a mount namespace of its own. It is gone with the process, so
    the samples that were committed to it must be captured again, as after a reboot.
    """
    run = TinyRun(tmp_path, tiny_model, features={"budget_mib": 8, "directory": str(tmp_path / "shm")})
    (tmp_path / "shm").mkdir()
    failed = forked_commands.script(ON_SMALL_MEMORY, str(tmp_path / "shm"), *run.arguments("produce"))
    if failed.returncode == 99:
        pytest.skip("mounting is not permitted here")
    assert failed.returncode == 5, failed.stderr
    assert "Next:" in failed.stderr
    assert "Traceback" not in failed.stderr
    committed = run.ledger().snapshot().committed
    assert 0 < committed < 40
    ended = run.command("train")
    assert ended.returncode == 0, ended.stderr
    assert durable(run) == 40


def durable(run: TinyRun) -> int:
    """Samples that the head's weights contain to their last visit."""
    head = run.ledger().snapshot().head
    steps = [trained for trained in run.ledger().history() if head is not None and trained.step <= head.step]
    return len({sample.sample_id for trained in steps for sample in trained.samples if sample.finished})


def _epochs(run: TinyRun) -> dict[str, int]:
    return dict(run.ledger().snapshot().epochs) if (run.directory / "ledger.db").exists() else {}


def _wait_until(condition: object) -> None:
    import time

    deadline = time.monotonic() + 500
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)
