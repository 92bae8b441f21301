"""Where modules of tests note what their forwards see."""

from __future__ import annotations

from typing import Any


class Notes(list[Any]):
    """A list that a module and its replicas share, since a copy of it is itself."""

    def __deepcopy__(self, memo: object) -> Notes:
        return self


class Shared(dict[Any, Any]):
    """A dictionary that a module and its replicas share, since a copy of it is itself."""

    def __deepcopy__(self, memo: object) -> Shared:
        return self
