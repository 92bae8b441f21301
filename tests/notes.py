"""Where modules of tests note what their forwards see."""

from __future__ import annotations

from typing import Any


class Notes(list[Any]):
    """A list that a module and its replicas share: they have own copies of plain lists only."""


class Shared(dict[Any, Any]):
    """A dictionary that a module and its replicas share."""
