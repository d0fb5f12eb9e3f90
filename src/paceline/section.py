"""The base class of the run file's sections, and the messages for mistakes in them.

A section lives beside the component that it configures, in a file without torch, and the component takes it
unchanged: a setting has one name, one default and one limit. `config/run.py` collects the sections.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from paceline.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["auto", "bfloat16", "float32"]
StartingValue = tuple[str, Any, str]  # of a run file that `paceline init` writes: key, value, comment


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda:\d{1,3}", name):
        raise ValueError("a device is auto, cpu, or cuda: and its number")
    return name


Device = Annotated[str, AfterValidator(_device)]


class Section(BaseModel):
    """`changeable`: the settings that may change between two starts of a run, because no bit of the weights
    depends on them; "*" means all."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, hide_input_in_errors=True)
    changeable: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """The section from a script's mapping. Raises ConfigError for unknown keys or impossible values."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(
                "; ".join(problems(error, cls)) + ".",
                why="A misspelt setting would silently keep its default.",
                next="correct the settings.",
            ) from error


def problems(error: ValidationError, model: type[BaseModel], section: str = "") -> list[str]:
    """One sentence per mistake: the key, the value, and the most similar valid key.

    `section`: the name of the section whose values were validated; "" for a whole file.
    """
    return [_told(problem, model, section) for problem in error.errors()]


def _told(problem: Any, model: type[BaseModel], section: str) -> str:
    where = [str(part) for part in problem["loc"]]
    name = ".".join([section, *where] if section else where)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name!r} ({nearest(where[-1], _keys_at(where[:-1], model))})"
    if problem["type"] == "missing":
        return f"{name!r} is missing"
    given = f", given {_shown(problem['input'])}" if not isinstance(problem["input"], dict) else ""
    return f"{name or 'the file'}: {problem['msg']}{given}"


def nearest(wrong: str, known: list[str]) -> str:
    """The name that was probably meant, or else all names."""
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _shown(value: object) -> str:
    try:
        return reprlib.repr(without_secrets(value) if isinstance(value, str) else value)
    except ValueError:  # more digits than Python writes
        return "a number of very many digits"


def without_secrets(text: str) -> str:
    """The text with what stands between :// and @ hidden: user and password of an address."""
    return re.sub(r"://[^\n]*@", "://***@", text)


def _keys_at(where: list[str], model: type[BaseModel]) -> list[str]:
    for part in where:
        if part.isdecimal():  # a place in a list of sections
            continue
        annotation = model.model_fields[part].annotation
        inner = next(iter(get_args(annotation)), annotation)
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    return list(model.model_fields)
