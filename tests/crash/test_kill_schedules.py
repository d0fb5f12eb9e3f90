"""Whole runs over real processes that are killed and stopped everywhere: the same weights, every time.

No torch, so that a run takes less than a tenth of a second; everything else is the product. What may
happen is in paceline.testing.killed_run, what must hold afterwards in
paceline.testing.check_of_killed_runs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from paceline.testing.kill_schedules import places

MODULE = "paceline.testing.kill_schedules"
PLACES = 172  # of a role and a point
RANDOM = 80
HAPPENED = {  # and how often at least, over all schedules
    "schedules": 460,
    "zombies": 100,
    "zombie rejected at give_back": 1,  # after its commit or reserve, which is refused first
    "zombie rejected at extend": 1,
    "zombie rejected at plan": 1,
    "zombie rejected at head": 1,
    "zombie rejected at release": 1,
    "steps replayed": 50,
    "orphan checkpoints found": 50,
    "orphan features swept": 10,
    "intents revoked": 50,
    "rolled forward": 20,
    "fell back": 3,
    "missed by the consumer": 20,
    "gave up samples to make room": 1,
    "checkpoints on pressure": 5,
    "history archived": 100,
    "isolation held": 50,
    "faults: kill": 400,
    "faults: stop": 200,
    "faults: kill_both": 3,
    "faults: reboot": 3,
    "faults: damage_head": 3,
    "faults: lose": 20,
}


@pytest.mark.timeout(900)  # over a minute of processor time, and the machine may be busy
def test_schedules_at_every_place_end_in_the_same_weights() -> None:
    """Every point: killed twice at its first reach, stopped at its third; and mixtures by seed.

    `make reliability` does both at each of these reaches."""
    command = [sys.executable, "-m", MODULE, "--systematic", "part", "--random", str(RANDOM), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    rare = {what: counts.get(what, 0) for what, least in HAPPENED.items() if counts.get(what, 0) < least}
    assert not rare, f"these hardly happened, so they were hardly tested: {rare}"


def test_schedules_of_three_producers_end_in_the_same_weights_on_a_server() -> None:
    """Each worker is killed, stopped and continued by itself; `make reliability` runs hundreds."""
    command = [sys.executable, "-m", MODULE, "--random", "24", "--producers", "3", "--server"]
    done = subprocess.run([*command, "--jobs", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    rare = [
        what for what in ("faults: kill", "faults: stop", "zombies", "steps replayed") if not counts[what]
    ]
    assert not rare, f"these did not happen: {rare}"


def test_schedules_of_two_ranks_end_in_the_same_weights() -> None:
    """Either is killed, or stopped until the other one has given it up; `make reliability` runs hundreds."""
    command = [sys.executable, "-m", MODULE, "--random", "16", "--ranks", "2", "--deadline", "200"]
    done = subprocess.run([*command, "--jobs", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    rare = [what for what in ("other ranks struck", "faults: stop", "steps replayed") if not counts[what]]
    assert not rare, f"these did not happen: {rare}"


def test_the_schedules_strike_everywhere() -> None:
    """A part that loses its kill points, or a detour that leads nowhere new, shows here."""
    assert len(places()) >= PLACES


PLANTED = {
    "no fence": (
        "from paceline.ledger.stores.sqlite.database import Database\n"
        "Database._check_fence = lambda self, fence, epoch: None",
        "plain/consumer/ledger.retire.before/2/stopped",
    ),
    "half-written checkpoints stay": (
        "from paceline.training.checkpoint import CheckpointFolder\n"
        "CheckpointFolder.sweep = lambda self, keep, *, epoch: []",
        "plain/consumer/checkpoint.after_file/2/once",
    ),
    "a resumed consumer reads from the start": (
        "from paceline.loader.passes import START, VisitOrder\n"
        "real = VisitOrder.__init__\n"
        "VisitOrder.__init__ = lambda self, **given: real(self, **{**given, 'position': START})",
        "plain/consumer/ledger.set_facts(checkpoint_wanted).after/2/once",
    ),
    "a new producer inherits leases": (
        "from paceline.ledger.stores.sqlite.database import Database\n"
        "real = Database._change\n"
        "skipped = lambda sql: 'deaths = deaths' in sql\n"
        "Database._change = lambda self, sql, *v: 0 if skipped(sql) else real(self, sql, *v)",
        "plain/producer/ledger.lease.after/2/once",
    ),
}

ON_A_SERVER = {
    "no fence on a server": (
        "from paceline.testing.lua_mutants import LuaMutant\n"
        "planted = LuaMutant('', 'if epoch ~= current then', 'if false then').planted()\n"
        "planted.__enter__()",
        "plain/consumer/ledger.retire.before/2/stopped",
    ),
}


@pytest.mark.parametrize("bug", PLANTED | ON_A_SERVER)
def test_a_planted_bug_is_found(bug: str) -> None:
    """The test above could fail: each of these breaks a promise that one of its schedules keeps.

    How two processes interleave is not fixed, so the schedule may be played a few times.
    """
    code, schedule = (PLANTED | ON_A_SERVER)[bug]
    script = f"{code}\nimport sys\nfrom {MODULE} import main\nsys.exit(main())"
    command = [sys.executable, "-c", script, "--name", schedule, "--deadline", "4", "--repeat", "4"]
    command += ["--server"] if bug in ON_A_SERVER else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, "nobody noticed"
    assert f"python -m {MODULE}" in done.stderr
    kept = re.findall("the run is in (.*)", done.stderr)  # a folder for each play that found the bug
    assert kept
    for folder in kept:
        shutil.rmtree(folder)
