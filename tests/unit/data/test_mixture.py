"""Several sources in one order, which sizes, weights and seed decide."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from paceline.data.mixture import Mixture
from paceline.data.opening import open_data
from paceline.data.prompts import Prompt
from paceline.data.settings import SourceSection
from paceline.data.source import BLOCK, RunPrompts
from paceline.errors import ConfigError


def write(path: Path, count: int, prefix: str = "") -> Path:
    lines = [json.dumps({"id": n, "prompt": f"{prefix or path.name} {n}"}) for n in range(count)]
    path.write_text("\n".join(lines))
    return path


def mixture(tmp_path: Path, *parts: tuple[int, float], seed: int = 0) -> Mixture:
    """Sources of these sizes and weights."""
    sections = [
        SourceSection(path=write(tmp_path / f"s{number}", size), weight=weight)
        for number, (size, weight) in enumerate(parts, start=1)
    ]
    found = open_data(sections, seed=seed)
    assert isinstance(found, Mixture)
    return found


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def test_a_round_takes_each_source_as_often_as_its_weight_says(tmp_path: Path) -> None:
    """All once, every second one, or each twice; the second time is a further round of that prompt."""
    mixed = mixture(tmp_path, (300, 1), (400, 0.5), (50, 2.5))
    prompts = mixed.read(0, mixed.size)
    assert mixed.size == 300 + 200 + 125
    assert len(set(ids(prompts))) == mixed.size
    assert {name for name in ids(prompts) if name.startswith("2:")} == {f"2:{n}" for n in range(0, 400, 2)}
    times = Counter(prompt.text for prompt in prompts if prompt.text.startswith("s3"))
    assert Counter(times.values()) == {3: 25, 2: 25}
    assert {p.round for p in prompts if p.prompt_id.startswith("3.1:")} == {1}
    assert "a round takes 200 samples of" in " ".join(mixed.notes)


def test_every_stretch_of_the_order_has_its_share_of_every_source(tmp_path: Path) -> None:
    """So that no source is trained last."""
    mixed = mixture(tmp_path, (3000, 1), (1000, 1))
    for first in range(0, 4000, 1000):
        share = Counter(name.partition(":")[0] for name in ids(mixed.read(first, 1000)))
        assert abs(share["2"] - 250) < 60


def test_the_order_follows_from_sizes_weights_and_seed(tmp_path: Path) -> None:
    """A place says its sample, whatever else was read; another seed changes the order alone."""
    mixed, whole = mixture(tmp_path, (1500, 1), (900, 1.5)), mixture(tmp_path, (1500, 1), (900, 1.5))
    everything = ids(whole.read(0, whole.size))
    for first in (2000, 7, 1020, 2840):
        assert ids(mixed.read(first, 30)) == everything[first : first + 30]
    other = ids(mixture(tmp_path, (1500, 1), (900, 1.5), seed=1).read(0, 9999))
    assert other != everything
    assert sorted(other) == sorted(everything)


@pytest.mark.parametrize(("weight", "at_once"), [(0.1, 32), (0.1, 1), (0.25, 32), (2, 32)])
def test_every_record_is_parsed_once_a_time_through_its_source(
    tmp_path: Path, weight: float, at_once: int
) -> None:
    """However thin its samples lie, and in groups as a run reads them."""
    mixed = mixture(tmp_path, (12_000, weight), (300, 1))
    before = [source.source.num_read for source in mixed.sources]
    for first in range(0, mixed.size, at_once):
        mixed.read(first, at_once)
    read = [s.source.num_read - n for s, n in zip(mixed.sources, before, strict=True)]
    assert read == [12_000 * max(1, int(weight)), 300]


def test_a_lone_sample_is_read_without_the_others_of_its_block(tmp_path: Path) -> None:
    """The longest are looked up before a run starts, wherever they lie."""
    mixed, whole = mixture(tmp_path, (12_000, 0.1)), mixture(tmp_path, (12_000, 0.1))
    everything, [source] = whole.read(0, whole.size), mixed.sources
    for ordinal in (700, 30, 1100):
        before = source.source.num_read
        assert mixed.read(ordinal, 1) == everything[ordinal : ordinal + 1]
        assert source.source.num_read - before <= BLOCK


@pytest.mark.parametrize("weight", [0.1, 0.0004])
def test_a_compressed_source_is_opened_once_a_time_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """Also if whole blocks of it hold no sample of the mixture."""
    path = tmp_path / "s.gz"
    path.write_bytes(gzip.compress(write(tmp_path / "s", 12_000).read_bytes()))
    sections = [SourceSection(path=path, weight=weight), SourceSection(path=write(tmp_path / "t", 3000))]
    mixed = open_data(sections)
    opened, real = [], gzip.GzipFile
    monkeypatch.setattr(gzip, "GzipFile", lambda **given: opened.append(1) or real(**given))
    prompts = [prompt for first in range(0, mixed.size, 32) for prompt in mixed.read(first, 32)]
    assert sum(prompt.prompt_id.startswith("1:") for prompt in prompts) == round(weight * 12_000)
    assert len(opened) == 1


def test_the_digests_tell_another_mixture(tmp_path: Path) -> None:
    """And the message says what differs."""
    mixed = mixture(tmp_path, (5, 1), (7, 1))
    known = mixed.digests(12)
    assert mixture(tmp_path, (5, 1), (7, 1)).digests(12) == known
    for parts, seed in (([(5, 1), (8, 1)], 0), ([(5, 1), (7, 2)], 0), ([(5, 1), (7, 1)], 1), ([(5, 2)], 0)):
        other = mixture(tmp_path, *parts, seed=seed)
        assert other.digests(other.size) != known
        assert "sizes or weights" in other.difference(known, other.size)
    write(tmp_path / "s2", 7, "another")
    edited = open_data([SourceSection(path=tmp_path / name) for name in ("s1", "s2")])
    assert edited.difference(known, 12) == f"the content of {tmp_path / 's2'} is another"


def test_samples_that_are_added_come_after_all_others(tmp_path: Path) -> None:
    """In an order of their own, of a new source too; what was there keeps its place and its digest."""
    first = mixture(tmp_path, (1500, 1), (900, 1.5))
    everything, known = first.read(0, first.size), first.digests(first.size)
    longer = mixture(tmp_path, (1500, 1), (980, 1.5), (70, 1))
    grown = longer.grown([[1500, 900], [1500, 980, 70]])
    assert grown.size == longer.size == grown.ends[-1]
    assert grown.read(0, first.size) == everything
    assert grown.digests(first.size) == known
    added = grown.read(first.size, 999)
    assert Counter(name.partition(":")[0] for name in ids(added)) == {"2": 80, "2.1": 40, "3": 70}
    assert len({*ids(everything), *ids(added)}) == grown.size
    assert ids(added) != sorted(ids(added))
    places = first.size + 5, 30, first.size + 90, first.size - 1
    assert [grown.read(place, 1)[0] for place in places] == [[*everything, *added][place] for place in places]
    assert ids(longer.read(0, first.size)) != ids(everything), "the order of one start is another"


def test_a_mixture_that_grows_takes_what_one_of_its_size_takes(tmp_path: Path) -> None:
    """Every fourth sample stays every fourth, however few are added at a time."""
    mixed = mixture(tmp_path, (23, 0.25), (9, 2.5))
    grown = mixed.grown([[n, 3 + n // 4] for n in range(1, 24)] + [[23, 9]])
    assert grown.size == mixed.size
    assert len(set(ids(grown.read(0, grown.size)))) == grown.size


def test_a_prompt_of_two_sources_is_taken_once(tmp_path: Path) -> None:
    """In the first; the same id for another text is no mistake between sources."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text('{"id": 1, "prompt": "a"}\n{"prompt": "b"}')
    two.write_text('{"prompt": "b"}\n{"id": 1, "prompt": "c"}\n{"id": 1, "prompt": "a"}')
    mixed = open_data([SourceSection(path=one), SourceSection(path=two)])
    assert sorted(p.text for p in mixed.read(0, 9)) == ["a", "b", "c"]
    assert not any(p.broken for p in mixed.read(0, 9)[:2])
    assert f"line 1 repeats line 2 of {one}" in " ".join(mixed.notes)
    assert mixed.sources[1].repeated == [1, 3]


def test_the_longest_are_found_at_their_places(tmp_path: Path) -> None:
    """Those that are taken, the longest first."""
    paths = [write(tmp_path / name, 100) for name in "ab"]
    for path, place, length in ((paths[0], 50, 900), (paths[1], 20, 800), (paths[1], 21, 950)):
        texts = path.read_text().splitlines()
        texts[place] = json.dumps({"id": place, "prompt": "x" * length})
        path.write_text("\n".join(texts))
    mixed = open_data([SourceSection(path=paths[0]), SourceSection(path=paths[1], weight=0.5)])
    longest = [mixed.read(ordinal, 1)[0] for ordinal in mixed.longest[:2]]
    assert [(p.prompt_id, len(p.text)) for p in longest] == [("1:50", 900), ("2:20", 800)]


def test_a_run_answers_a_mixture_as_often_as_it_has_rounds(tmp_path: Path) -> None:
    """In the same order."""
    mixed = mixture(tmp_path, (4, 1), (3, 2))
    run = RunPrompts(mixed, rounds=2)
    prompts = run.read(0, 99)
    assert run.size == len(prompts) == len(set(ids(prompts))) == 20
    assert [name.partition("/")[2] for name in ids(prompts[:10])] == [
        name.partition("/")[2] for name in ids(prompts[10:])
    ]
    assert {p.round for p in prompts if p.prompt_id.startswith("1/2.1:")} == {2}


def test_held_out_texts_are_found_in_chats_too(tmp_path: Path) -> None:
    """What a user says in any turn counts."""
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "held"}]}
    (tmp_path / "chats").write_text(json.dumps(chat))
    data = open_data([SourceSection(path=tmp_path / "chats")], heldout=["held"])
    assert data.sources[0].index.shared == 1
    assert data.has_chats


def test_every_source_must_hold_something(tmp_path: Path) -> None:
    """The one that does not is named."""
    with pytest.raises(ConfigError, match="nothing to read"):
        open_data([])
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="empty holds no prompt"):
        open_data([SourceSection(path=write(tmp_path / "full", 3)), SourceSection(path=tmp_path / "empty")])
