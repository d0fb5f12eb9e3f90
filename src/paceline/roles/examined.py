"""What `paceline doctor` says of one thing that it looked at. No torch."""

from __future__ import annotations

from typing import Literal

from paceline.section import Section

State = Literal["good", "note", "bad"]


class Examined(Section):
    """`topic`: what was looked at; `what` was found; `mend`: what to do about it, "" if nothing."""

    topic: str
    state: State
    what: str
    mend: str = ""
