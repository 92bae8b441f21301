"""The command `asyncdp infer`, whose flags are the options of a job."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from ..infer import read_config
from ..infer.config import NamedOption, by_flag, format_config, make_options, named_options
from .running import run_infer

_OF_THE_COMMAND = {
    "config": (Path | None, None, "File of TOML with options, by these names."),
    "print_config": (bool, False, "Print all options as such a file."),
    "dry_run": (bool, False, "Check all, run one batch."),
    "plot": (Path | None, None, "Picture of rate and load, .png or .svg."),
    "json": (bool, False, "Log and summary as JSON lines."),
}


def signature() -> inspect.Signature:
    """Return the signature from which typer makes the flags."""
    parameters = [_parameter("context", typer.Context)]
    parameters += [_of_job(option) for option in named_options().values()]
    for name, (kind, default, text) in _OF_THE_COMMAND.items():
        parameters.append(_parameter(name, Annotated[kind, typer.Option(_flag(name), help=text)], default))
    return inspect.Signature(parameters)


def _of_job(option: NamedOption) -> inspect.Parameter:
    # A path of Python would take the slashes of a URL for one.
    kind: Any = str if option.kind is Path else list[str] if option.kind is tuple else option.kind
    if option.name == "inputs":
        return _parameter(option.name, Annotated[list[str] | None, typer.Argument(help=option.help)], None)
    flags = [_flag(option.name), *(["-o"] if option.name == "output" else [])]
    default = None if option.is_required or option.kind is tuple else option.default
    kind = kind | None if default is None else kind
    return _parameter(option.name, Annotated[kind, typer.Option(*flags, help=option.help)], default)


def _parameter(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def run_command(context: typer.Context, given: dict[str, Any]) -> int:
    """Do what the flags of `asyncdp infer` ask for; return the exit code.

    Args:
        context: says which flags were given; those count more than the file.
        given: values by name, defaults included.
    """
    own = {name: given.pop(name) for name in _OF_THE_COMMAND}
    from_file = {} if own["config"] is None else by_flag(read_config(own["config"]))
    options = make_options({**from_file, **{name: given[name] for name in given if _is_given(context, name)}})
    if own["print_config"]:
        print(format_config(options), end="")
        return 0
    return run_infer(options, dry_run=own["dry_run"], plot=own["plot"], as_json=own["json"])
