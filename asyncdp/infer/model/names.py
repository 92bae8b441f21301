"""Names of objects on the command line, as `package.module:name`, and of exceptions in errors."""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import JobUsageError


def load_name(spec: str, option: str) -> Any:
    """Import the object that `spec` names; modules in the working folder are found too.

    Args:
        spec: `package.module:name`, where the name may have dots.
        option: the option it came from, for the error.

    Raises:
        JobUsageError: the module or the name in it cannot be had.
    """
    module = import_module_of(spec, option)
    name = spec.partition(":")[2]
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError as error:
        raise JobUsageError(
            f"{option} {spec}: {error}", f"Check the name after the colon in {module.__file__}."
        ) from error


def import_module_of(spec: str, option: str) -> ModuleType:
    """Import the module part of `package.module:name`."""
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise JobUsageError(f"{option} {spec} names nothing", "Write it as package.module:name.")
    # A console script does not have the working folder on its path, as `python -m` does.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise JobUsageError(
            f"{option} {spec}: importing {module_name} failed with {type(error).__name__}: {error}",
            "Check the spelling, and that the module imports in this environment.",
        ) from error


def source_of(spec: str, option: str) -> Path | None:
    """Return the file that the module of `spec` was loaded from, None for built-in ones."""
    path = import_module_of(spec, option).__file__
    return Path(path) if path else None


def brief(error: Exception, limit: int = 600) -> str:
    """Return the text of an exception on one line, without colours, cut where it gets long."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return text if len(text) <= limit else text[:limit] + " ..."
