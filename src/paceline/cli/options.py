"""Options that a command takes as one value, as tables: the type and the help of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", readable=False)]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="The run file, or the run's directory.", readable=False)
]
HOST = "127.0.0.1"  # what `paceline serve` listens on
DATA_OPTIONS: dict[str, tuple[Any, str]] = {
    "target": (Path, "The target's folder, for tokens and masks."),
    "template": (list[str], "NAME=VALUE of target.template, a variable of the target's chat template."),
    "format": (str, "The format of its records; auto finds it for each record."),
    "split": (str, "The split of a `datasets` folder."),
    "answers": (str, "As data.answers: target or data."),
    "max_prompt_tokens": (int, "As data.max_prompt_tokens."),
    "max_answer_tokens": (int, "As data.max_answer_tokens."),
    "too_long": (str, "As data.too_long: truncate, skip or refuse."),
}
COMPARE_OPTIONS: dict[str, tuple[Any, str]] = {
    "directory": (Path, "Where features and drafts are kept."),
    "prompts": (int, "Only the first N prompts of the data."),
    "tokens": (int, "Train each variant on so many tokens."),
    "minutes": (float, "Train each variant for so many minutes."),
    "json": (Path, "Write all figures to this file."),
    "markdown": (Path, "Write the table to this file."),
}
INIT_OPTIONS: dict[str, tuple[Any, str]] = {
    "target": (str, "The model: a folder, or organisation/name of the hub."),
    "data": (Path, "Chats or prompts: a file or folder (docs/data.md)."),
    "heldout": (Path, "A file of prompts to measure on, none of them in the data."),
    "method": (str, "eagle3 (the default), p-eagle, dflash, dspark, domino or dflash2."),
    "gpus": (int, "How many GPUs the run may use (default: those of this machine)."),
    "serve": (str, "What runs the target: vllm, sglang or none (the producer)."),
    "name": (str, "The run's name."),
    "target_config": (Path, "A folder with the target's config.json and tokenizer."),
}
LAUNCH_OPTIONS: dict[str, tuple[Any, str]] = {
    "hosts": (int, "Hosts that train, each with machine.trainers ranks (default: 1)."),
    "producers": (int, "Producers that join, besides those of the first host (default: 0)."),
    "gpus": (int, "GPUs of each host that trains (default: as many as the run file names)."),
    "memory_gib": (int, "Memory of each host, besides /dev/shm (default: 16)."),
}

Command = TypeVar("Command", bound=Callable[..., Any])


def takes(options: Mapping[str, tuple[Any, str]]) -> Callable[[Command], Command]:
    """The command's `**` argument becomes these options, by name: each has a type and a help text.

    An option that is not given is None.
    """

    def with_options(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind != inspect.Parameter.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, typer.Option(help=told)],
            )
            for name, (kind, told) in options.items()
        ]
        command.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return command

    return with_options
