"""The CUDA devices that a scheduler or the user has left to this process, as CUDA reads their list."""

from __future__ import annotations

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
BY_UUID = ("GPU-", "MIG-")


def names_left(named: str) -> list[str]:
    """The numbers or UUIDs in the variable's value, up to the first that is neither: CUDA, too, stops there.

    Schedulers write -1 or NoDevFiles where they leave none.
    """
    left = []
    for part in named.split(","):
        name = part.strip()
        if not name.isdecimal() and not name.startswith(BY_UUID):
            break
        left.append(name)
    return left
