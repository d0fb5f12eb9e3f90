"""The run file's `engine` section for SGLang: a server of the user's. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from paceline.engines.served.settings import ServedSection, server_url
from paceline.section import StartingValue


class SglangSection(ServedSection):
    """An SGLang server at `url`. `auto` as the target's dtype means bfloat16.

    With `directory`, the folder that the server's plug-in writes states to, server and producer share one
    machine and one user. Without, states come in the answers as lists of numbers: for small runs, of methods
    that need no state after the last block.
    """

    component: ClassVar[str] = "paceline.engines.sglang.engine:SglangEngine"
    name: Literal["sglang"] = "sglang"
    url: Annotated[str, AfterValidator(server_url)]

    @classmethod
    def starting_values(cls, run: str, gpus: int) -> list[StartingValue]:  # noqa: ARG003
        return [
            ("url", "http://127.0.0.1:30000", "paceline engine sglang THIS_FILE prints the server's command"),
            ("directory", f"/dev/shm/sglang-{run}", "where its plug-in leaves states"),  # noqa: S108
        ]
