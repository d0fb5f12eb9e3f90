"""The run file's `engine` section for vLLM: a server of the user's, or one of the run's own. No torch."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from paceline.engines.served.settings import ServedSection
from paceline.section import Count, StartingValue

# The command sets these itself, or they would make the server another one than the run's.
OWN_ARGUMENTS = (
    *("--model", "--served-model-name", "--tokenizer", "--dtype", "--host", "--port", "--api-key", "--uds"),
    *("--speculative-config", "--kv-transfer-config", "--enable-prefix-caching", "--config"),
    *("--generation-config", "--trust-remote-code"),
)


def _arguments(given: tuple[str, ...]) -> tuple[str, ...]:
    for argument in given:
        name = argument.partition("=")[0].replace("_", "-").replace("--no-", "--")
        # The server takes any unambiguous beginning of a name.
        if name.startswith("--") and any(own.startswith(name) for own in OWN_ARGUMENTS):
            raise ValueError(f"{argument.partition('=')[0]} is set by the run itself")
    return given


def _connector(text: str) -> str:
    if not re.fullmatch(r"([A-Za-z_][\w.]*:)?[A-Za-z_]\w*", text):
        raise ValueError("a connector is a class name, or module:class")
    return text


class VllmSection(ServedSection):
    """A vLLM server that writes hidden states to files: `url`, or `managed: true` for one of the run's own.

    The server and the producer share one machine and one user. `auto` as the target's dtype means bfloat16.
    `directory` is by default a folder of the run beside its features.

    For a managed server: `program` starts it, with `args` after the run's own; `devices` are the CUDA devices
    that it sees, counted among those of CUDA_VISIBLE_DEVICES (none: the CPU build); `connector` may be
    module:class, a replacement for vLLM's own; `restarts_max` limits its restarts without an answer between.
    """

    component: ClassVar[str] = "paceline.engines.vllm.engine:VllmEngine"
    changeable: ClassVar[tuple[str, ...]] = (*ServedSection.changeable, "managed", "devices", "restarts_max")
    name: Literal["vllm"] = "vllm"
    managed: bool = False
    program: Annotated[tuple[str, ...], Field(min_length=1)] = ("vllm", "serve")
    args: Annotated[tuple[str, ...], AfterValidator(_arguments)] = ()
    devices: tuple[Annotated[int, Field(ge=0, le=4096)], ...] = ()
    connector: Annotated[str, AfterValidator(_connector)] = "ExampleHiddenStatesConnector"
    restarts_max: Count = 3

    @classmethod
    def starting_values(cls, run: str, gpus: int) -> list[StartingValue]:  # noqa: ARG003
        found: list[StartingValue] = [
            ("managed", True, "the run starts it; or `url` of a server of yours"),
        ]
        if gpus:
            found.append(("devices", list(range(max(1, gpus - 1))), "CUDA devices of the server"))
        if gpus == 1:
            share = ["--gpu-memory-utilization", "0.6"]
            found.append(("args", share, "training takes the rest of the same GPU"))
        return found

    @model_validator(mode="after")
    def _one_server(self) -> Self:
        if self.managed == (self.url is not None):
            raise ValueError("engine vllm: give either url (a server of yours) or managed: true")
        if self.managed and self.api_key_variable is not None:
            raise ValueError("engine vllm: a managed server has a key of its own; remove api_key_variable")
        return self
