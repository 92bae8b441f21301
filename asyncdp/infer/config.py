"""Options by name: as keywords of Python, as flags, and in a configuration file."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import JobUsageError
from .model.task_options import TaskOptions
from .options import InferOptions
from .places import place_of

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


@dataclasses.dataclass(frozen=True)
class NamedOption:
    """One option of a job.

    Attributes:
        name: that of the flag, with underscores.
        field: its attribute of `InferOptions`.
        kind: `bool`, `int`, `float`, `str`, `Path`, or `tuple` for some texts.
        default: `dataclasses.MISSING` where it must be given.
    """

    name: str
    field: str
    kind: type
    default: Any
    help: str

    @property
    def is_required(self) -> bool:
        """Whether there is no job without it."""
        return self.default is dataclasses.MISSING

    def convert(self, value: Any) -> Any:
        """Return a value of this option's type.

        Raises:
            JobUsageError: the value is of another type.
        """
        if value is None and self.default is None:
            return None
        if self.field == "ray_resources" and isinstance(value, Mapping):
            return json.dumps(dict(value))
        is_path = isinstance(value, str | os.PathLike)
        if self.kind is tuple:
            values = [value] if is_path else value
            if isinstance(values, list | tuple) and all(isinstance(v, str | os.PathLike) for v in values):
                return tuple(os.fspath(each) for each in values)
        elif self.kind in (str, Path):
            if is_path:
                return place_of(os.fspath(value)) if self.kind is Path else os.fspath(value)
        elif type(value) is self.kind or (type(value), self.kind) == (int, float):
            return self.kind(value)
        wanted = _KINDS.get(self.kind, "a text or a list of texts")
        raise JobUsageError(f"{self.name} is {value!r:.80}", f"Give {wanted}.")


@functools.cache
def named_options() -> dict[str, NamedOption]:
    """Return all options of a job by name."""
    hints = get_type_hints(InferOptions)
    found = [
        NamedOption(
            field.metadata["name"] or field.name,
            field.name,
            _kind_of(hints[field.name]),
            field.default,
            field.metadata["help"],
        )
        for field in dataclasses.fields(InferOptions)
    ]
    own = {field.name for field in dataclasses.fields(TaskOptions)}
    # Those of a base class come first, and are of less use to most.
    return {option.name: option for option in sorted(found, key=lambda option: option.field in own)}


def _kind_of(hint: Any) -> type:
    """Return the type that a hint such as `int | None` or `tuple[str, ...]` is about."""
    if isinstance(hint, types.UnionType):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    kind: type = get_origin(hint) or hint
    return kind


def make_options(given: Mapping[str, Any], before: InferOptions | None = None) -> InferOptions:
    """Make the options of a job from values by name.

    Args:
        given: values by the names of flags.
        before: options that these change.

    Raises:
        JobUsageError: a name is unknown, a value does not fit, or one that is needed is missing.
    """
    options = named_options()
    values = {options[name].field: options[name].convert(value) for name, value in by_flag(given).items()}
    if before is not None:
        return dataclasses.replace(before, **values)
    for option in options.values():
        if option.is_required and not values.get(option.field):
            raise JobUsageError(f"{option.name} is missing", f"Name it: {option.help}")
    return InferOptions(**values)


def by_flag(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the names of flags, with underscores.

    Args:
        given: values by these names, with hyphens or underscores, or by attributes of `InferOptions`.

    Raises:
        JobUsageError: a name is unknown, or two are the same.
    """
    options = named_options()
    aliases = {option.field: name for name, option in options.items()}
    found: dict[str, Any] = {}
    for name, value in given.items():
        plain = name.replace("-", "_")
        flag = aliases.get(plain, plain)
        if flag not in options:
            raise _unknown(name)
        if flag in found:
            raise JobUsageError(f"{name} is given twice", "Leave one of them out.")
        found[flag] = value
    return found


def _unknown(name: str) -> JobUsageError:
    near = difflib.get_close_matches(name.replace("-", "_"), named_options(), 1, 0.5)
    remedy = f"Did you mean {near[0]}?" if near else "See `asyncdp infer --help`."
    return JobUsageError(f"There is no option {name}", remedy)


def read_config(path: Path) -> dict[str, Any]:
    """Read options by name from a file of TOML, with the names of the command line.

    Raises:
        JobUsageError: the file cannot be read or is no TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise JobUsageError(f"--config {path}: {error.strerror or error}", "Name a file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobUsageError(
            f"--config {path} is no TOML: {error}", "Write name = value, a line each."
        ) from error


def format_config(options: InferOptions) -> str:
    """Write all options as TOML for `read_config`; those without a value are comments."""
    lines = []
    for option in named_options().values():
        value = getattr(options, option.field)
        if value is None:
            lines.append(f"# {option.name} =  # {option.help}")
        else:
            lines.append(f"{option.name} = {_toml(value)}  # {option.help}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """Return a value as TOML, whose words for texts, numbers and lists are those of JSON."""
    plain = value if isinstance(value, bool | int | float | str | tuple) else str(value)
    return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")
