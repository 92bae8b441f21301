"""What travels from the readers to the writers."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .values import as_text

Columns = dict[str, "np.ndarray[Any, Any] | list[Any]"]
"""Named outputs; every value has one entry per record along its first dimension."""


class Row(NamedTuple):
    """What a reader makes of one entry of one file."""

    value: Any
    id: Any
    where: str
    error: Exception | None = None
    kept: Mapping[str, Any] = {}
    tested: Mapping[str, Any] | None = None
    """Entries that `--where` asks of, None where the reader has looked at them itself."""


class Record(NamedTuple):
    """One row of the input.

    Attributes:
        position: row index over all inputs, from 0.
        id: the entry of the id column, as text or a scalar of Arrow, or the position.
        value: what preprocessing gets.
        where: file and line or row, for a person to find it.
        error: why the reader could not read it, else None.
        kept: entries for the output, by column of the input; from Arrow they are its scalars.
        is_selected: whether the job is about it; else it only fills its position.
    """

    position: int
    id: Any
    value: Any
    where: str
    error: Exception | None = None
    kept: Mapping[str, Any] = {}
    is_selected: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A record that was refused, as text: a traceback would keep its batch in memory."""

    position: int
    id: str | int
    where: str
    error: str
    traceback: str

    @classmethod
    def of(cls, record: Record, error: BaseException) -> Failure:
        """Describe why a record was refused."""
        text = "".join(traceback.format_exception(error))
        return cls(
            record.position, as_text(record.id), record.where, f"{type(error).__name__}: {error}", text
        )
