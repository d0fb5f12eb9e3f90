"""The single row of table `run`: read when a transaction begins, written when it ends."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class RunRow:
    """The counters of a run; schema.sql says what each means."""

    lsn: int
    place_order: str | None
    num_prompts: int
    next_ordinal: int
    closed: int
    committed: int
    next_generation: int
    trained_step: int
    started_step: int | None
    archived_step: int
    archived_place: int
    archived: int

    def values(self) -> tuple[int | str | None, ...]:
        return tuple(getattr(self, name) for name in COLUMNS)


COLUMNS = tuple(field.name for field in fields(RunRow))
READ = f"SELECT {', '.join(COLUMNS)} FROM run"  # noqa: S608 (no outside text)
READ_TO_CHANGE = (  # with a role's epoch, last operation and its result; NULL where there is none
    "SELECT role.epoch, role.last_op, role.result, "  # noqa: S608 (no outside text)
    f"{', '.join(COLUMNS)} FROM run LEFT JOIN role ON role.name = ?"
)
WRITE = f"UPDATE run SET {', '.join(f'{name} = ?' for name in COLUMNS)}"  # noqa: S608 (no outside text)
