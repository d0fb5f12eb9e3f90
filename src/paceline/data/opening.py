"""Opens what a run reads: each source by what it is, all of them under one index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from paceline.data.dataset import Dataset, refuse_empty
from paceline.data.elements import Elements, after_bracket
from paceline.data.index import indexed
from paceline.data.lines import Lines
from paceline.data.mixture import Mixture
from paceline.data.packed import first_bytes, unreadable
from paceline.data.records import Records, Source
from paceline.data.settings import Format, SourceSection
from paceline.data.tables import Parquet, from_folder, from_hub
from paceline.errors import ConfigError
from paceline.regular_files import kind_of

Data = Dataset | Mixture


def open_data(
    sections: Sequence[SourceSection],
    *,
    seed: int = 0,
    heldout: Collection[str] = (),
    index_path: Path | None = None,
) -> Data:
    """The samples of all sources. One source of weight 1 is read in its own order.

    `heldout`: keys of questions that must not be among the prompts' (`asked`). `index_path`: where the index
    is kept. Raises ConfigError if a source cannot be read or holds no prompt.
    """
    if not sections:
        raise ConfigError("There is nothing to read.", next="name a source: data.path, or data.sources.")
    sources = [Source(open_records(section), section.format) for section in sections]
    indexes = indexed(sources, heldout, index_path)
    datasets = [Dataset(source, index) for source, index in zip(sources, indexes, strict=True)]
    for dataset in datasets:
        refuse_empty(dataset)
    if len(datasets) == 1 and sections[0].weight == 1:
        return datasets[0]
    return Mixture(datasets, [section.weight for section in sections], seed)


def open_file(
    path: Path, *, format: Format = "prompts", heldout: Collection[str] = (), index_path: Path | None = None
) -> Dataset:
    """One file as a source of its own. Raises ConfigError as `open_data` does."""
    dataset = scan(SourceSection(path=path, format=format), heldout=heldout, index_path=index_path)
    refuse_empty(dataset)
    return dataset


def open_held_out(path: Path) -> Dataset:
    """The file of evaluation.prompts, of any formats. Raises ConfigError as `open_data` does."""
    try:
        return open_file(path, format="auto")
    except ConfigError as error:
        raise ConfigError(
            error.what,
            why=error.why,
            next="set evaluation.prompts to a file with a JSON object in each line, such as "
            '{"prompt": ...} or {"messages": [...]}; `paceline data check FILE` shows what is found.',
        ) from error


def scan(section: SourceSection, *, heldout: Collection[str] = (), index_path: Path | None = None) -> Dataset:
    """One source of its own, even if nothing in it can be used. Raises ConfigError if it cannot be read."""
    source = Source(open_records(section), section.format)
    [index] = indexed([source], heldout, index_path)
    return Dataset(source, index)


def open_records(section: SourceSection) -> Records:
    """Raises ConfigError if there is nothing that can be read."""
    if section.path is None:
        return from_hub(section.hub, section.subset, section.split, section.revision)
    try:
        kind = kind_of(section.path)
    except OSError as error:
        raise unreadable(section.path, error) from error
    if kind == "folder":
        return from_folder(section.path, section.split)
    if first_bytes(section.path) == b"PAR1":
        return Parquet(section.path)
    lines = Lines(section.path)
    with lines.opened() as stream:
        return Elements(section.path) if after_bracket(stream) else lines
