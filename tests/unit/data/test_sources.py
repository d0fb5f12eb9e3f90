"""Compressed files, tables and folders give the same prompts; what is damaged or hostile is refused."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.data import elements, lines, tables
from paceline.data.dataset import Dataset
from paceline.data.opening import open_data, open_file, open_records
from paceline.data.settings import SourceSection
from paceline.data.source import BLOCK
from paceline.errors import ConfigError

RECORDS: list[dict[str, Any]] = [
    {
        "id": f"r{n}",
        "messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "a"}],
    }
    for n in range(2 * BLOCK + 100)
]


def json_lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def as_plain(path: Path) -> Path:
    path.write_bytes(json_lines(RECORDS))
    return path


def as_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress(json_lines(RECORDS[:1500])) + gzip.compress(json_lines(RECORDS[1500:])))
    return path


def as_zstd(path: Path) -> Path:
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    path.write_bytes(pack(json_lines(RECORDS[:1500])) + pack(json_lines(RECORDS[1500:])))
    return path


def as_array(path: Path) -> Path:
    path.write_text(json.dumps(RECORDS, indent=1))
    return path


def as_packed_array(path: Path) -> Path:
    path.write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    return path


def as_parquet(path: Path) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=700)
    return path


def as_folder(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{**record, "picture": b"x"} for record in RECORDS]).save_to_disk(path)
    return path


@pytest.mark.parametrize("write", [as_gzip, as_zstd, as_array, as_packed_array, as_parquet, as_folder])
def test_the_same_records_are_the_same_prompts_however_they_are_kept(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Block by block, from the index, in any order; a run may go on with another file of the same records."""
    plain, kept = open_file(as_plain(tmp_path / "plain"), format="auto"), tmp_path / "index.json"
    path = write(tmp_path / "other")
    open_file(path, format="auto", index_path=kept)
    other = open_file(path, format="auto", index_path=kept)
    assert other.source.num_read == 0
    assert other.digests(plain.size) == plain.digests(plain.size)
    for first in (BLOCK + 3, 2 * BLOCK + 50, 0):
        assert other.read(first, 40) == plain.read(first, 40)
    [prompt] = other.read(1, 1)
    assert prompt.place.endswith(f"{other.records.unit} 2")


@pytest.mark.parametrize("write", [as_plain, as_gzip, as_array, as_packed_array, as_parquet, as_folder])
def test_blocks_in_a_row_are_read_in_one_go(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """A stream is not begun anew for each."""
    path = write(tmp_path / "file")
    kept = tmp_path / "index.json"
    open_file(path, format="auto", index_path=kept)
    file = open_file(path, format="auto", index_path=kept)
    for first in range(0, file.size, 64):
        file.read(first, 64)
    assert file.source.num_read == len(RECORDS)


def test_a_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    """Whatever its name says."""
    assert open_records(SourceSection(path=as_plain(tmp_path / "a.gz"))).described == "JSON lines"
    assert open_records(SourceSection(path=as_gzip(tmp_path / "a.jsonl"))).described == "JSON lines, gzip"
    assert open_records(SourceSection(path=as_parquet(tmp_path / "a"))).described == "Parquet"
    assert open_records(SourceSection(path=as_array(tmp_path / "b"))).described == "JSON array"
    assert open_records(SourceSection(path=as_packed_array(tmp_path / "c"))).described == "JSON array, gzip"


def test_a_line_that_no_memory_should_hold_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of a small file that unpacks to a large one; its content is known by a digest."""
    monkeypatch.setattr(lines, "RECORD_BYTES_MAX", 1000)
    found = []
    for letter in b"xy":
        path = tmp_path / chr(letter)
        long = b'{"prompt": "' + bytes([letter]) * 10_000_000 + b'"}\n'
        path.write_bytes(gzip.compress(json_lines(RECORDS[:1]) + long + json_lines(RECORDS[1:2])))
        assert path.stat().st_size < 20_000
        first, broken, last = open_file(path, format="auto").read(0, 9)
        assert broken.broken == f"{path}, line 2: it is too long: 10000015 bytes, more than 1000"
        assert (first.prompt_id, broken.prompt_id, last.prompt_id) == ("r0", "unreadable-line-2", "r1")
        found.append(open_file(path, format="auto").digests(9))
    assert found[0] != found[1]


@pytest.mark.parametrize("write", [as_gzip, as_zstd, as_array, as_parquet])
@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_damaged_file_is_refused(write: Callable[[Path], Path], harm: str, tmp_path: Path) -> None:
    """Half of it would be another data set."""
    path = write(tmp_path / "file")
    data = bytearray(path.read_bytes())
    if harm == "cut":
        data = data[: len(data) // 2]
    else:
        data[-20:] = bytes(byte ^ 0xFF for byte in data[-20:])
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read"):
        open_file(path, format="auto")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """And a folder with several splits asks which."""
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="no folder that `save_to_disk` wrote"):
        open_file(tmp_path)
    part = datasets.Dataset.from_list(RECORDS[:3])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(ConfigError, match="has the splits 'train', 'test', and none is named"):
        open_file(tmp_path / "both")
    data = open_data([SourceSection(path=tmp_path / "both", split="test")])
    assert (data.size, data.name) == (3, f"{tmp_path / 'both'}:test")


def test_a_folder_cannot_name_other_files_or_hang_its_reader(tmp_path: Path) -> None:
    """It may come from anywhere."""
    path = as_folder(tmp_path / "folder")
    state = path / "state.json"
    as_written = json.loads(state.read_text())
    state.write_text(json.dumps({**as_written, "_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(ConfigError, match=r"names a file outside of its folder: '\.\./secret\.arrow'"):
        open_file(path)
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(ConfigError, match=r"state\.json is neither a file nor a folder"):
        open_file(path)


def test_a_data_set_of_the_hub_is_loaded_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the library, which keeps a copy; errors say what to check."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*names: Any, **parts: Any) -> Any:
        asked.append((names, parts))
        if names[0] == "no/such":
            raise FileNotFoundError("nothing there")
        return datasets.Dataset.from_list(RECORDS[:5])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = open_data([SourceSection(hub="some/chats", subset="en", split="train", revision="abc")])
    assert (data.size, data.name) == (5, "some/chats:en:train")
    assert asked == [(("some/chats", "en"), {"split": "train", "revision": "abc"})]
    with pytest.raises(ConfigError, match="'no/such' of the hub cannot be loaded"):
        open_data([SourceSection(hub="no/such")])


@pytest.mark.parametrize(("library", "write"), [("pyarrow", as_parquet), ("datasets", as_folder)])
def test_a_missing_library_says_how_to_install_it(
    library: str, write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core installs none of them."""
    path = write(tmp_path / "file")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"Next: pip install 'paceline\[data\]'"):
        open_file(path)


def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path) -> None:
    """A FIFO would be waited for, and a device never ends."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), Path("a\0b"), tmp_path / "none"):
        with pytest.raises(ConfigError, match="cannot be read"):
            open_data([SourceSection(path=path)])


def test_elements_of_an_array_are_found_wherever_its_file_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets, commas and quotes within texts end nothing; a broken element fails alone, with its number."""
    monkeypatch.setattr(elements, "RECORD_BYTES_MAX", 200)
    parts = [
        r'{"id": 1, "prompt": "a ] b, } c \" d \\"}',
        '{"id": 2, "prompt": [{"x": "deep"}]}',
        '{"id": 3 "prompt": "no colon"}',
        '{"id": 4, "prompt": "' + "x" * 500 + '"}',
        '"a text"',
        '{"id": 6, "prompt": "\u00e9\u4e16"}',
    ]
    path = tmp_path / "a.json"
    path.write_bytes("\ufeff\n [".encode() + " ,\r\n".join(parts).encode() + b" ] \n")
    found = []
    for size in (8, 9, 11, 13, 64, 1 << 20):
        monkeypatch.setattr(elements, "PIECE", size)
        dataset = open_file(path, format="auto")
        prompts = dataset.read(0, 9)
        found.append((prompts, dataset.digests(6)))
        records = list(dataset.records.read())
        assert all(next(iter(dataset.records.read(r.offset, r.number))) == r for r in records[:3])
    assert all(other == found[0] for other in found)
    prompts = found[0][0]
    assert (prompts[0].text, prompts[5].text) == ('a ] b, } c " d \\', "\u00e9\u4e16")
    reasons = [prompt.broken.removeprefix(f"{path}, ") for prompt in prompts]
    assert reasons[1:5] == [
        'element 2: it has no text under "prompt"',
        "element 3: it is not JSON (Expecting ',' delimiter: line 1 column 10 (char 9))",
        "element 4: it is too long: 526 bytes, more than 200",
        "element 5: it is not a JSON object",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"prompt": "a"}, {"prompt": "b"', "it ends within its JSON array"),
        (b'[{"prompt": "a"}', "it ends within its JSON array"),
        (b'[{"prompt": "a"}] {"prompt": "b"}', "something follows its JSON array"),
        (b'[{"prompt": "a"}]\n[{"prompt": "b"}]', "something follows its JSON array"),
        (b'[{"prompt": "a"}, {"prompt": "b}]', "it ends within its JSON array"),
        (b"[]", "holds no prompt"),
    ],
)
def test_an_array_that_is_not_whole_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    """Half of it would be another data set."""
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        open_file(tmp_path / "a.json", format="auto")


def test_rows_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a row group."""
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 16)
    file = open_file(as_parquet(tmp_path / "file"), format="auto")
    assert isinstance(file, Dataset)
    assert [p.prompt_id for p in file.read(699, 3)] == ["r699", "r700", "r701"]
