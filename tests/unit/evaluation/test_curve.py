"""A run's curve: which points count, which is the best, when it is flat, and that no write loses a point."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paceline.evaluation.curve import FILE, Curve, Point, read_curve, record_point
from paceline.testing.recording_files import CODES, RecordedFiles, Strike, failing

BEGAN = {"rendering_date": "today"}


def way(length: float, tokens: int, branching: int) -> dict[str, Any]:
    return {
        "prompts": 3,
        "num_draft_tokens": tokens,
        "branching": branching,
        "acceptance_length": length,
        "emitted_per_cycle": length - 0.02,
        "acceptance_rate": [0.4, 0.1],
    }


def point(step: int, length: float, **changed: Any) -> Point:
    """The tree is the better the worse the chain is, so that a test sees which of them decides."""
    report = {**way(3 - length, 7, 4), "chain": way(length, 3, 1)}
    made = Point(step, "today", f"step-{step:08d}-000001-abc", "m" * 64, "d" * 64, "c", report, 100)
    return replace(made, **changed)


def test_the_chain_decides_which_point_is_the_best(tmp_path: Path) -> None:
    """Servers draft chains; of two equal points the later one has seen more."""
    for step, length in ((100, 1.4), (200, 1.6), (300, 1.6), (400, 1.5)):
        record_point(tmp_path, point(step, length))
    curve = read_curve(tmp_path, BEGAN)
    assert curve == Curve.of([point(100, 1.4), point(200, 1.6), point(300, 1.6), point(400, 1.5)])
    best = curve.best()
    assert best is not None
    assert (best.step, best.told) == (300, "1.60 (chain of 3), 1.40 (tree of 7)")


def test_the_best_is_one_whose_draft_is_there() -> None:
    """A figure without its weights is of no use."""
    curve = Curve.of([point(100, 1.4), point(200, 1.6)])
    best = curve.best({point(100, 1.4).checkpoint})
    assert best is not None
    assert best.step == 100
    assert curve.best(()) is None
    assert Curve().best() is None


def test_points_of_other_conditions_or_of_another_run_are_not_compared(tmp_path: Path) -> None:
    """Other prompts give other figures; a file may outlive the run that lay beside it."""
    record_point(tmp_path, point(100, 1.9, conditions="other prompts"))
    record_point(tmp_path, point(200, 1.9, began="long ago"))
    record_point(tmp_path, point(300, 1.4))
    assert [p.step for p in read_curve(tmp_path, BEGAN).points] == [300]
    assert [p.step for p in read_curve(tmp_path, {"rendering_date": "long ago"}).points] == [200]


def test_a_step_that_is_measured_again_replaces_its_point_and_no_other_line(tmp_path: Path) -> None:
    """After a roll-back the step is another checkpoint's; what a person wrote into the file stays."""
    record_point(tmp_path, point(100, 1.4))
    record_point(tmp_path, point(100, 1.4, conditions="before"))
    with (tmp_path / FILE).open("ab") as file:
        file.write(b"# \xff my note\n")
    record_point(tmp_path, point(100, 1.5))
    lines = (tmp_path / FILE).read_bytes().splitlines()
    assert len(lines) == 3
    assert lines[1] == b"# \xff my note"
    assert [p.acceptance_length for p in read_curve(tmp_path, BEGAN).points] == [1.5]


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", "[" * 100_000, '{"step": 1}', "\x00\ud800"])
def test_a_line_that_is_no_point_is_left_out(tmp_path: Path, line: str) -> None:
    """The file lies beside the run; anybody may write into it."""
    record_point(tmp_path, point(100, 1.4))
    text = (tmp_path / FILE).read_text()
    wrong = [text.replace("1.4", "NaN"), text.replace("100", '"100"'), text.replace('"c"', "7"), text[:-20]]
    (tmp_path / FILE).write_text(f"{line}\n{text}{''.join(wrong)}", errors="surrogatepass")
    assert read_curve(tmp_path, BEGAN) == Curve.of([point(100, 1.4)])


def test_a_file_that_is_none_shows_no_curve_and_is_not_written_over(tmp_path: Path) -> None:
    """A folder in its place is not waited for, and not replaced."""
    (tmp_path / FILE).mkdir()
    assert read_curve(tmp_path, BEGAN) == Curve()
    with pytest.raises(OSError, match="folder"):
        record_point(tmp_path, point(100, 1.4))


@pytest.mark.parametrize("code", CODES)
def test_a_failing_disk_loses_no_point(tmp_path: Path, code: str) -> None:
    """Whichever file call fails, the file has the points before or the new one too; the next one is added."""
    for turn in itertools.count(1):
        place = tmp_path / str(turn)
        place.mkdir()
        files = RecordedFiles(place)
        with files.watching():
            record_point(place, point(100, 1.4))
            files.arm(Strike(failing(CODES[code]), turn))
            try:
                record_point(place, point(200, 1.5))
            except OSError:
                assert files.struck
            struck = files.struck
            files.arm(None)
            steps = [p.step for p in read_curve(place, BEGAN).points]
            assert steps in ([100], [100, 200])
            assert struck or steps == [100, 200]
            record_point(place, point(300, 1.6))
            assert [p.step for p in read_curve(place, BEGAN).points] == [*steps, 300]
        if not struck:
            assert turn > 4
            return


def lengths(*values: float) -> Curve:
    return Curve.of([point(100 * number, value) for number, value in enumerate(values, start=1)])


def test_a_curve_is_flat_if_the_last_evaluations_gain_nothing_over_all_before() -> None:
    """A dip and the way back are no gain."""
    why = lengths(1.70, 1.71, 1.71, 1.72).stands_still(3, 0.02)
    assert why == (
        "acceptance length has not risen by more than 0.02 in the last 3 evaluations "
        "(1.71, 1.71, 1.72; 1.70 before)"
    )
    assert lengths(1.70, 1.60, 1.65, 1.70).stands_still(3, 0.0)
    assert not lengths(1.70, 1.71, 1.71, 1.72).stands_still(3, 0.01)
    assert not lengths(1.70, 1.71, 1.71).stands_still(3, 0.5), "too few to say"
    assert lengths(1.7, 1.7).stands_still(1, 0.0)


def test_points_before_a_run_went_on_do_not_make_it_flat() -> None:
    """It stopped there once, and was told to go on."""
    curve = lengths(1.7, 1.7, 1.7, 1.7, 1.7)
    assert curve.stands_still(3, 0.01)
    assert not curve.stands_still(3, 0.01, after=200)
    assert curve.stands_still(3, 0.01, after=100)
