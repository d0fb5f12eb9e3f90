"""Rows of Parquet files and of data sets of the library `datasets`, read a few at a time.

A null cell is nothing: tables have a cell for every key that any row has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from paceline.data.extra import needs_extra
from paceline.data.formats import KEYS
from paceline.data.packed import unreadable
from paceline.data.records import Record
from paceline.errors import ConfigError
from paceline.regular_files import kind_of, open_regular, read_regular

ROWS_AT_ONCE = 256
STATE_BYTES_MAX = 16 << 20


class Parquet:
    unit = "row"
    is_stream = False
    described = "Parquet"

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def identity(self) -> list[Any]:
        return [self.name, *_stamp(self.path)]

    def read(self, offset: int = 0, number: int = 1) -> Iterator[Record]:
        with needs_extra("pyarrow", self.path):
            import pyarrow
            from pyarrow import parquet
        try:
            with open_regular(self.path) as raw, parquet.ParquetFile(raw) as file:
                names = [name for name in file.schema_arrow.names if name in KEYS]
                group, first = _group_of(file.metadata, offset)
                groups = list(range(group, file.metadata.num_row_groups))
                batches = file.iter_batches(ROWS_AT_ONCE, groups, names) if groups else ()
                rows = chain.from_iterable(batch.to_pylist() for batch in batches)
                for place, row in enumerate(rows, start=first):
                    if place >= offset:
                        yield Record(number + place - offset, place, without_nulls(row))
        except (OSError, pyarrow.ArrowException) as error:
            raise unreadable(self.path, error) from error


def _group_of(metadata: Any, row: int) -> tuple[int, int]:
    """The row group that holds the row, and that group's first row."""
    first = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if row < first + size:
            return group, first
        first += size
    return metadata.num_row_groups, first


class HuggingFaceDataset:
    """A folder that `save_to_disk` wrote, or a data set of the hub, of which the library keeps a copy."""

    unit = "row"
    is_stream = False

    def __init__(self, data: Any, name: str, described: str) -> None:
        """`data`: a `datasets.Dataset`, without its other columns."""
        self._data, self._name, self.described = data, name, described

    @property
    def name(self) -> str:
        return self._name

    def identity(self) -> list[Any]:
        files = sorted(Path(file["filename"]) for file in self._data.cache_files)
        return [self._name, len(self._data), *chain.from_iterable(_stamp(file) for file in files)]

    def read(self, offset: int = 0, number: int = 1) -> Iterator[Record]:
        for start in range(offset, len(self._data), ROWS_AT_ONCE):
            columns = self._data[start : start + ROWS_AT_ONCE]
            rows = zip(*columns.values(), strict=True)
            for place, cells in enumerate(rows, start=start):
                row = dict(zip(columns, cells, strict=True))
                yield Record(number + place - offset, place, without_nulls(row))


def from_folder(path: Path, split: str) -> HuggingFaceDataset:
    """Raises ConfigError if `save_to_disk` did not write the folder, or the split is not in it."""
    with needs_extra("datasets", path):
        import datasets
    try:
        _refuse_odd_files(path)
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds
        raise unreadable(path, f"it is no folder that `save_to_disk` wrote: {error}") from error
    data = _only(_split_of(found, path, split))
    return HuggingFaceDataset(data, _named(str(path), split), "folder of the library datasets")


def _refuse_odd_files(folder: Path) -> None:
    """Raise OSError or ValueError for a folder that names files outside of it, or holds a FIFO or device."""
    for path in folder.rglob("*"):
        if not kind_of(path):
            raise OSError(f"{path.name} is neither a file nor a folder")
        if path.name == "state.json":
            state = json.loads(read_regular(path, STATE_BYTES_MAX))
            names = [file["filename"] for file in state["_data_files"]]
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{path} names a file outside of its folder: {outside[0]!r}")


def from_hub(name: str, subset: str, split: str, revision: str) -> HuggingFaceDataset:
    """Raises ConfigError if there is no such data set, or it has several splits and none is named."""
    with needs_extra("datasets", name):
        import datasets
    try:
        found = datasets.load_dataset(name, subset or None, split=split or None, revision=revision or None)
    except Exception as error:  # the library raises many kinds
        raise ConfigError(
            f"The data set {name!r} of the hub cannot be loaded ({type(error).__name__}: {error}).",
            why="It is fetched once by `paceline train` or `paceline data check`; later starts use the copy.",
            next="check the name, subset, split and revision, and the network.",
        ) from error
    data = _only(_split_of(found, name, split))
    return HuggingFaceDataset(data, _named(name, subset, split), "data set of the hub")


def _split_of(found: Any, name: Path | str, split: str) -> Any:
    if not isinstance(found, Mapping):
        return found
    if split in found:
        return found[split]
    asked = f"not {split!r}" if split else "none is named"
    raise ConfigError(
        f"{name} has the splits {', '.join(map(repr, found))}, and {asked}.",
        why="Only one of them is trained on.",
        next="name it under 'split' beside the path or the hub name.",
    )


def _only(data: Any) -> Any:
    """The data set with the columns that are read; others, such as images, would be decoded for nothing."""
    return data.select_columns([name for name in data.column_names if name in KEYS]).with_format(None)


def _named(*parts: str) -> str:
    return ":".join(part for part in parts if part)


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def without_nulls(value: Any) -> Any:
    """The value without keys whose value is None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(part) for part in value]
    return value
