"""Where a journal's lines are kept: in one file on a disk, or in a store as objects with numbers.

Objects cannot grow, so every line is one of its own. Each is put only where there is none of its number yet,
and a process that takes over begins with the next number: the one that had the folder before then fails at
its next line. That keeps two writers apart without a lock, which a killed process would leave behind.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ...errors import JobUsageError
from ..files import write_failed, write_whole
from ..places import is_remote, names_in, put, read_all

JOURNAL_NAME = "_journal.jsonl"

_PREFIX = "_journal-"


class Log(Protocol):
    """Lines that are appended one by one, each on the disk or in the store when `append` returns."""

    path: Path

    def read(self) -> tuple[list[bytes], int]:
        """Return the lines from the last beginning on, and the number of the last one.

        Raises:
            OSError: there are none.
        """

    def begin(self, data: bytes, number: int) -> None:
        """Begin anew with some lines, after the line with that number.

        Raises:
            JobUsageError: another process has written since.
        """

    def append(self, lines: Sequence[bytes]) -> None:
        """Append some lines.

        Raises:
            JobUsageError: another process has written since.
        """

    def check_owner(self) -> None:
        """Fail when another process has written since.

        Raises:
            JobUsageError: it has.
        """


def log_in(folder: Path) -> Log:
    """Return the log in an output folder."""
    return _ObjectLog(folder) if is_remote(folder) else _FileLog(folder)


class _FileLog(Log):
    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_NAME

    def read(self) -> tuple[list[bytes], int]:
        return self.path.read_bytes().split(b"\n"), 0

    def begin(self, data: bytes, number: int) -> None:
        write_whole(self.path, data)

    def append(self, lines: Sequence[bytes]) -> None:
        try:
            with open(self.path, "ab") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_failed(self.path, error) from error

    def check_owner(self) -> None:
        return  # the folder's lock keeps others out


class _ObjectLog(Log):
    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_NAME
        self._folder = folder
        self._number = 0

    def read(self) -> tuple[list[bytes], int]:
        numbers = self._numbers()
        if not numbers:
            raise FileNotFoundError("it has no object with lines of a journal")
        lines: list[bytes] = []
        # From the end on, since the last beginning repeats what was before it.
        for last in range(len(numbers), 0, -_OBJECTS_AT_ONCE):
            some = numbers[max(0, last - _OBJECTS_AT_ONCE) : last]
            objects = read_all([self._place(number) for number in some])
            begins = [index for index, data in enumerate(objects) if data.count(b"\n") != 1 or _begins(data)]
            lines = b"".join(objects[begins[-1] if begins else 0 :]).split(b"\n") + lines
            if begins:
                break
        return lines, numbers[-1]

    def begin(self, data: bytes, number: int) -> None:
        self._number = number
        self.append([data])

    def append(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            self._put(line)

    def _put(self, line: bytes) -> None:
        place = self._place(self._number + 1)
        try:
            put(place, line, only_new=True)
        except FileExistsError:
            raise self._taken() from None
        except OSError as error:
            raise write_failed(place, error) from error
        self._number += 1

    def check_owner(self) -> None:
        if self._numbers()[-1:] != [self._number]:
            raise self._taken()

    def _taken(self) -> JobUsageError:
        return JobUsageError(
            f"Another process is writing into {self._folder}", "Let only one of them go on, with --resume."
        )

    def _numbers(self) -> list[int]:
        stems = [name.removesuffix(".jsonl").removeprefix(_PREFIX) for name in names_in(self._folder)]
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _place(self, number: int) -> Path:
        return self._folder / f"{_PREFIX}{number:08d}.jsonl"


_OBJECTS_AT_ONCE = 256


def _begins(data: bytes) -> bool:
    return data.partition(b" ")[2].startswith(b'{"fingerprint"')
