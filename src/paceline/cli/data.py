"""`paceline data check`: what a source holds, what the target sees of it, and what its capture costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from paceline.cli.plain import say
from paceline.config.load import load_run_config
from paceline.data.opening import scan
from paceline.data.settings import DataSection
from paceline.data.survey import Survey, survey
from paceline.errors import ConfigError
from paceline.roles.data_check import CheckRequest, CheckResult, ShownSample, check_with_target
from paceline.target.settings import TargetSection
from paceline.terminal import printable

TARGET_STYLE = "bold green"
BARS = 40  # characters of the longest bar
RUN_FILES = (".yaml", ".yml")


def check(console: Console, path: Path, given: Mapping[str, Any], *, measure: bool) -> None:
    """Tell of the sources of a run file, or of one file with the `given` options, by their names."""
    is_run_file = path.suffix in RUN_FILES
    data, request = of_run_file(path, given) if is_run_file else of_file(path, given)
    for source in data.sources:
        tell_survey(console, str(source.path or source.hub), survey(scan(source)))
    if request is None:
        say(console, "lengths, masks and costs: add --target MODEL, the target's folder")
        return
    request = request.model_copy(update={"measure": measure})
    tell_target(console, request, check_with_target(request))


def of_run_file(path: Path, given: Mapping[str, Any]) -> tuple[DataSection, CheckRequest]:
    """What the run would read, with its target. Raises ConfigError, for options too: the file has all."""
    if given:
        name = next(iter(given))
        raise ConfigError(
            f"--{name.replace('_', '-')} is given beside the run file {path}.",
            why="The check of a run file shows what that run would do.",
            next=f"set it in {path}, or check a file of samples instead.",
        )
    config = load_run_config(path)
    method = config.method.model_dump(mode="json")
    request = CheckRequest(data=config.data, target=config.target, method=method, seed=config.run.seed)
    return config.data, request


def of_file(path: Path, given: Mapping[str, Any]) -> tuple[DataSection, CheckRequest | None]:
    """One source, read with a run's defaults and what is given instead; no request without a target."""
    rest = {key: value for key, value in given.items() if key not in ("target", "template")}
    data = DataSection.parse({"path": path, **rest})
    variables = template_variables(given.get("template", ()))
    if "target" not in given:
        if variables:
            raise ConfigError(
                "--template is given without --target.",
                why="The variables are those of the target's own chat template.",
                next="add --target MODEL, the target's folder.",
            )
        return data, None
    return data, CheckRequest(data=data, target=TargetSection(model=given["target"], template=variables))


def template_variables(given: Sequence[str]) -> dict[str, Any]:
    """The variables of `NAME=VALUE` texts, each value read as YAML, as in a run file. Raises ConfigError."""
    found: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        try:
            found[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise _no_variable(text, f"its value is not YAML: {error}") from error
        if not sign or not name.isidentifier():
            raise _no_variable(text, "a template's variable is NAME=VALUE")
    return found


def _no_variable(text: str, reason: str) -> ConfigError:
    return ConfigError(
        f"--template {text}: {reason}.",
        why="The masks that are shown would be those of another rendering.",
        next="name each variable as in target.template of a run file: --template enable_thinking=false.",
    )


def tell_survey(console: Console, name: str, found: Survey) -> None:
    """What the source is taken for, its counts, and each kind of bad record with its first places."""
    formats = ", ".join(f"{count} {kind}" for kind, count in found.kinds.most_common())
    say(console, f"{name}: {found.described}, {found.num_prompts} samples ({formats or 'none usable'})")
    if found.turns:
        turns = ", ".join(f"{count} {role}" for role, count in found.turns.most_common())
        say(console, f"turns: {turns}; {found.with_tools} samples have tools")
    say(console, f"answers: {found.answered} of {found.usable} samples have some")
    if found.repeated:
        say(console, f"{found.repeated} repeat an earlier one and are used once:")
        for told in found.first_repeated:
            say(console, f"    {told}")
    for fault, broken in sorted(found.faults.items(), key=lambda item: -item[1].count):
        say(console, f"{broken.count} cannot be used: {fault}")
        for told in broken.first:
            say(console, f"    {told}")


def tell_target(console: Console, request: CheckRequest, found: CheckResult) -> None:
    """Lengths, samples with their masks, problems and costs, as the target sees the sources."""
    looked_at = len(found.lengths) + sum(problem.count for problem in found.problems)
    answers = request.data.answers
    whose = {"target": "the target writes them", "data": "those of the data"}.get(answers, "those of a run")
    say(console, f"answers, as checked here: {whose} (data.answers: {answers})")
    for line in _histogram(found.lengths):
        say(console, line)
    for problem in found.problems:
        say(console, f"{problem.count} of {looked_at} cannot be captured: {problem.reason}")
        for told in problem.first:
            say(console, f"    {told}")
    for sample in found.samples:
        _show(console, sample, request.data.max_answer_tokens)
    for line in _costs(request, found):
        say(console, line)


def _histogram(lengths: Sequence[int]) -> Iterator[str]:
    if not lengths:
        return
    ordered = sorted(lengths)
    middle, high = ordered[len(ordered) // 2], ordered[len(ordered) * 95 // 100]
    yield (
        f"tokens of {len(lengths)} samples: {ordered[0]} to {ordered[-1]}, half of them up to {middle}, "
        f"95 of 100 up to {high}"
    )
    sizes = [length.bit_length() for length in ordered]
    most = max(sizes.count(size) for size in set(sizes))
    for size in range(sizes[0], sizes[-1] + 1):
        count = sizes.count(size)
        bar = "#" * -(-BARS * count // most)
        yield f"  {1 << size >> 1:>7} to {(1 << size) - 1:<7} {bar:<{BARS}} {count}"


def _show(console: Console, sample: ShownSample, max_answer_tokens: int) -> None:
    """The sample with its targets highlighted; between [[ and ]] where there is no colour."""
    coloured = console.is_terminal and console.color_system is not None
    shown = Text()
    for part in sample.parts:
        shown.append_text(_part(printable(part.text), part.is_target, coloured))
    if sample.rest:
        shown.append(f" ... {sample.rest} more tokens")
    if sample.is_open:
        what = f"the target writes up to {max_answer_tokens} tokens"
        shown.append_text(_part(what, is_target=True, coloured=coloured))
    say(console, f"sample {sample.name}, {sample.num_tokens} tokens; what the draft learns is highlighted:")
    for line in shown.split("\n", allow_blank=True):
        console.print(Text("    ") + line, soft_wrap=True)


def _part(text: str, is_target: bool, coloured: bool) -> Text:
    if not is_target:
        return Text(text)
    return Text(text, TARGET_STYLE) if coloured else Text(f"[[{text}]]")


def _costs(request: CheckRequest, found: CheckResult) -> Iterator[str]:
    if not found.lengths:
        return
    samples = found.num_samples
    size = samples * found.sample_bytes
    yield (
        f"capture: about {samples} samples a round, at most {_bytes(found.sample_bytes)} each on average "
        f"with the features of {request.method['name']} in {found.dtype}, {_bytes(size)} in all; shared "
        "memory holds features.budget_mib of it at a time"
    )
    if found.group_samples:
        seconds = samples / found.group_samples * found.group_seconds
        yield (
            f"time: {found.group_samples} samples took {found.group_seconds:.1f} s, a round about "
            f"{_clock(seconds)} on this machine"
        )
    else:
        yield f"time: add --measure to load {request.target.model} and time a capture group"


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _clock(seconds: float) -> str:
    hours, minutes = int(seconds) // 3600, int(seconds) // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"
