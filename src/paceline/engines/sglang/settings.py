"""The run file's `engine` section for SGLang: a server of the user's. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from paceline.engines.served.settings import ServedSection, server_url


class SglangSection(ServedSection):
    """An SGLang server at `url`. `auto` as the target's dtype means bfloat16.

    With `directory`, the folder that the server's plug-in writes states to, server and producer share one
    machine and one user. Without, states come in the answers as lists of numbers: for small runs, of methods
    that need no state after the last block.
    """

    component: ClassVar[str] = "paceline.engines.sglang.engine:SglangEngine"
    name: Literal["sglang"] = "sglang"
    url: Annotated[str, AfterValidator(server_url)]
