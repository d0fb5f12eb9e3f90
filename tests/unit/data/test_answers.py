"""Answers are on the disk before their samples are committed, whole, and found by ordinal."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from paceline.data import answers
from paceline.data.answers import ORDINALS_PER_FILE, Answer, AnswerFiles
from paceline.errors import FencedError, StoreError

ONE = Answer(3, "0/a", (5, 6, 7, 8), ((2, 4),), "digest", ("what came before",))
TWO = Answer(ORDINALS_PER_FILE, "0/b", (9, 2**31 - 1), ((0, 1), (1, 2)))
THREE = Answer(4, "0/c", (1, 2), ((1, 2),))


def test_what_is_kept_is_there_for_every_later_process(tmp_path: Path) -> None:
    """By ordinal, whichever file it is in; all of them in the order of the run."""
    files = AnswerFiles(tmp_path / "answers")
    files.keep([TWO, ONE])
    files.keep([THREE])
    for known in (files, AnswerFiles(tmp_path / "answers")):
        assert [known.get(n) for n in (3, 4, ORDINALS_PER_FILE, 5)] == [ONE, THREE, TWO, None]
        assert list(known.all()) == [ONE, THREE, TWO]


def test_an_answer_is_written_once(tmp_path: Path) -> None:
    """The same one again takes no room; another one for the same prompt counts from then on."""
    AnswerFiles(tmp_path).keep([ONE])
    [path] = tmp_path.glob("*.answers")
    size = path.stat().st_size
    AnswerFiles(tmp_path).keep([ONE])
    assert path.stat().st_size == size
    other = Answer(3, "0/a", (5, 6, 1), ((2, 3),))
    files = AnswerFiles(tmp_path)
    files.keep([other])
    assert files.get(3) == AnswerFiles(tmp_path).get(3) == other


def test_superseded_answers_take_no_more_room_than_those_that_count(tmp_path: Path) -> None:
    """However many starts write another answer to the same prompt, which is then not committed."""
    AnswerFiles(tmp_path).keep([THREE])
    [path] = tmp_path.glob("*.answers")
    reader = AnswerFiles(tmp_path)  # of another process, that knows where the records were
    sizes = set()
    for start in range(40):
        assert reader.get(4) == THREE
        files = AnswerFiles(tmp_path)
        files.keep([Answer(3, "0/a", (5, 6, start), ((2, 3),))])
        assert files.get(3) == AnswerFiles(tmp_path).get(3) == Answer(3, "0/a", (5, 6, start), ((2, 3),))
        assert files.get(4) == THREE
        sizes.add(path.stat().st_size)
    assert len(sizes) < 5
    assert [answer.ordinal for answer in reader.all()] == [3, 4]


def test_an_answer_that_was_damaged_since_it_was_found_is_not_taken(tmp_path: Path) -> None:
    """Its tokens would be others."""
    AnswerFiles(tmp_path).keep([ONE])
    [path] = tmp_path.glob("*.answers")
    files = AnswerFiles(tmp_path)
    assert files.get(3) == ONE
    data = bytearray(path.read_bytes())
    data[data.index(7)] ^= 1
    path.write_bytes(data)
    assert files.get(3) is None


def test_a_record_that_a_crash_tore_is_cut_off(tmp_path: Path) -> None:
    """It was never answered for; what stands before it, and what is written after it, is whole."""
    AnswerFiles(tmp_path).keep([ONE])
    [path] = tmp_path.glob("*.answers")
    first = path.stat().st_size
    AnswerFiles(tmp_path).keep([THREE])
    whole = path.read_bytes()
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        files = AnswerFiles(tmp_path)
        assert (files.get(3), files.get(4)) == (ONE, None)
        files.keep([Answer(5, "0/d", (1, 3), ((1, 2),))])
        later = AnswerFiles(tmp_path)
        assert [later.get(n) for n in (3, 4)] == [ONE, None]
        assert later.get(5) == Answer(5, "0/d", (1, 3), ((1, 2),))


def test_a_flipped_bit_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    """A record counts with its digest only."""
    AnswerFiles(tmp_path).keep([ONE, THREE])
    [path] = tmp_path.glob("*.answers")
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert AnswerFiles(tmp_path).get(3) is None
    assert AnswerFiles(tmp_path).get(4) == THREE


def test_a_token_takes_a_few_bytes(tmp_path: Path) -> None:
    """So a hundred thousand answers of 500 tokens fit into 150 MB, not into gigabytes."""
    AnswerFiles(tmp_path).keep([Answer(0, "0/a", tuple(range(40_000, 40_500)), ((100, 500),))])
    [path] = tmp_path.glob("*.answers")
    assert path.stat().st_size < 3.2 * 500


def test_a_disk_that_fails_stops_the_producer_before_the_commit(tmp_path: Path) -> None:
    """With advice."""
    (tmp_path / "answers").write_text("in the way")
    with pytest.raises(StoreError, match="check that disk"):
        AnswerFiles(tmp_path / "answers").keep([ONE])


def test_producers_that_write_to_one_file_lose_none_of_each_others_answers(tmp_path: Path) -> None:
    """Each sees what the others have written since its last look; the newest record of a prompt counts."""
    one, other = AnswerFiles(tmp_path), AnswerFiles(tmp_path)
    one.keep([ONE])
    assert other.get(3) == ONE
    other.keep([THREE])
    one.keep([Answer(5, "0/d", (1, 3), ((1, 2),))])
    other.keep([Answer(5, "0/d", (1, 4), ((1, 2),))])
    for files in (one, other, AnswerFiles(tmp_path)):
        assert [files.get(n) for n in (3, 4)] == [ONE, THREE]
        assert files.get(5) == Answer(5, "0/d", (1, 4), ((1, 2),))


def test_a_replaced_producer_writes_no_answer(tmp_path: Path) -> None:
    """It finds out in its turn, before its successor's: the record that counts is never a late one."""
    late, successor = AnswerFiles(tmp_path), AnswerFiles(tmp_path)
    successor.keep([ONE])

    def refuse() -> None:
        raise FencedError("another epoch has taken over", next="stop")

    with pytest.raises(FencedError):
        late.keep([Answer(3, "0/a", (5, 6, 1), ((2, 3),))], refuse)
    assert late.get(3) == ONE
    late.keep([ONE], refuse)  # nothing is written


def test_another_producers_torn_record_is_cut_off(tmp_path: Path) -> None:
    """It died in its turn; the next one to write does not append behind half a record."""
    files = AnswerFiles(tmp_path)
    files.keep([ONE])
    [path] = tmp_path.glob("*.answers")
    whole = path.stat().st_size
    AnswerFiles(tmp_path).keep([THREE])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 3)
    assert files.get(4) is None
    files.keep([Answer(5, "0/d", (1, 3), ((1, 2),))])
    assert path.stat().st_size > whole
    assert [AnswerFiles(tmp_path).get(n) for n in (3, 4)] == [ONE, None]
    assert AnswerFiles(tmp_path).get(5) is not None


def test_producers_of_several_hosts_have_files_of_their_own_and_the_newest_capture_counts(
    tmp_path: Path,
) -> None:
    """No lock orders them. What one host has just written another one finds, where it must."""
    first, second = AnswerFiles(tmp_path, "1-a"), AnswerFiles(tmp_path, "2-b")
    late, counts = replace(ONE, generation=5), replace(ONE, token_ids=(5, 6, 1, 1), generation=9)
    assert second.get(3) is None
    first.keep([replace(THREE, generation=4)])
    second.keep([counts])
    first.keep([late])  # by a producer that was held up, and is refused when it commits
    assert first.get(3, anew=True) == second.get(3) == counts
    assert second.get(4, anew=True) == replace(THREE, generation=4)
    reader = AnswerFiles(tmp_path)
    assert [answer.ordinal for answer in reader.all()] == [3, 4]
    assert reader.get(3) == counts
    assert set(reader.digests(lambda _: True)) == {3, 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000000-1-a.answers",
        "00000000-2-b.answers",
    ]


def test_an_answer_that_differs_in_its_capture_alone_is_not_written_again(tmp_path: Path) -> None:
    """As for a sample that was lost and came back with the same tokens."""
    files = AnswerFiles(tmp_path)
    files.keep([replace(ONE, generation=5)])
    files.keep([replace(ONE, generation=8)])
    assert files.get(3) == replace(ONE, generation=5)


def test_on_several_hosts_the_committed_capture_has_the_newest_record(tmp_path: Path) -> None:
    """One of a producer that died before its commit was unseen here, and is newer than the one known here."""
    first, second, third = (
        AnswerFiles(tmp_path, "1-a"),
        AnswerFiles(tmp_path, "2-b"),
        AnswerFiles(tmp_path, "3-c"),
    )
    first.keep([replace(ONE, generation=5)])
    assert third.get(3) == replace(ONE, generation=5)
    second.keep([replace(ONE, token_ids=(5, 6, 1, 1), generation=6)])
    committed = replace(ONE, generation=7)
    third.keep([committed])
    assert AnswerFiles(tmp_path, "4-d").get(3, anew=True) == committed


def test_a_lost_sample_does_not_cost_another_look_at_all_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only at what was written since, by whatever host."""
    first, second = AnswerFiles(tmp_path, "1-a"), AnswerFiles(tmp_path, "2-b")
    first.keep([replace(ONE, generation=1)])
    assert second.get(3, anew=True) == replace(ONE, generation=1)
    read, real = [], answers._File.read

    def counted(file: answers._File, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return real(file, start, stop)

    monkeypatch.setattr(answers._File, "read", counted)
    first.keep([replace(THREE, generation=2)])
    read.clear()
    assert second.get(4, anew=True) == replace(THREE, generation=2)
    path = tmp_path / "00000000-1-a.answers"
    assert max(read) < path.stat().st_size
