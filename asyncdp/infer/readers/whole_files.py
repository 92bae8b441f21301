"""Folders of files that are one record each; decoding happens later, in the workers of preprocessing."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

from ...errors import MissingExtraError
from ..records import Row
from .base import Contents, InputFile, Selection


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
    applies_where = False

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return that a file is one row, with the path that identifies it.

        Raises:
            MissingExtraError: what decodes them is not installed.
        """
        if importlib.util.find_spec(self.module) is None:
            raise MissingExtraError(f"Reading {self.what}", self.package, self.extra)
        return Contents(1, ("path",))

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Row]:
        """Yield the path of the file."""
        row = selection.row({"path": str(file.path)}, file.name)
        yield row if row.error else row._replace(value=file.path)
