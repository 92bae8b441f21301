"""What the command line needs to know of an option."""

from __future__ import annotations

import dataclasses
from typing import Any


def described(text: str, *, name: str | None = None) -> dict[str, str | None]:
    """Return what a field of options carries with it.

    Args:
        text: what its help says.
        name: that of the flag, in the singular where it may be repeated; None for the attribute's.
    """
    return {"help": text, "name": name}


def option(default: object, text: str, *, name: str | None = None) -> Any:
    """Make a field of options with a default; arguments as for `described`."""
    return dataclasses.field(default=default, metadata=described(text, name=name))
