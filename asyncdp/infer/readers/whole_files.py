"""Folders of files that are one record each; decoding happens later, in the workers of preprocessing."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

from ...errors import MissingExtraError
from ..records import Records
from .base import Contents, InputFile
from .selection import Selection


@dataclasses.dataclass(frozen=True)
class WholeFileReader:
    """Every file is one record; with the id column `path` its id is the file's path.

    Attributes:
        what: the files are, for messages.
        module: that decodes them.
        package: that the module comes from.
        extra: of asyncdp, with that package.
    """

    what: str
    module: str
    package: str
    extra: str

    binary = True

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return that a file is one row, with the path that identifies it.

        Raises:
            MissingExtraError: what decodes them is not installed.
        """
        if importlib.util.find_spec(self.module) is None:
            raise MissingExtraError(f"Reading {self.what}", self.package, self.extra)
        return Contents(1, ("path",))

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Records]:
        """Yield the path of the file."""
        found = selection.records([{"path": str(file.path)}], [file.name])
        yield dataclasses.replace(found, values=[file.path] * len(found))
