"""The one row of table run, as an object: read once when a transaction begins, written once at its end."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class RunRow:
    """The counters of a run; what each means stands in schema.sql."""

    lsn: int
    last_seq: int
    num_tasks: int
    next_ordinal: int
    next_generation: int
    trained_step: int
    started_step: int | None
    folded_step: int
    folded_seq: int

    def values(self) -> tuple[int | None, ...]:
        return tuple(getattr(self, name) for name in COLUMNS)


COLUMNS = tuple(field.name for field in fields(RunRow))
READ = f"SELECT {', '.join(COLUMNS)} FROM run"  # noqa: S608 (no outside text)
READ_TO_CHANGE = (  # with the epoch of a role and the result of an operation, NULL where there is none
    f"SELECT (SELECT epoch FROM role WHERE name = ?), (SELECT result FROM operation WHERE op_id = ?), "  # noqa: S608
    f"{', '.join(COLUMNS)} FROM run"
)
WRITE = f"UPDATE run SET {', '.join(f'{name} = ?' for name in COLUMNS)}"  # noqa: S608 (no outside text)
