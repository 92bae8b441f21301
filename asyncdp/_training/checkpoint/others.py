"""The other processes of an engine, when a checkpoint is saved or loaded; there may be none."""

from __future__ import annotations

import base64
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ... import _loops
from ..._distributed.agreement import Kind
from ..._distributed.communicator import Communicator
from ..._runtime.task import on_cancel
from ...errors import PeerStepError
from ..processes import SharedSteps
from .entries import CalledOff, Stop

_POLL_SECONDS = 0.02
_CANCELLED = "its caller was cancelled"


class Others:
    """What a process alone has to do with others: nothing.

    Attributes:
        rank: of this process.
        is_first: whether it is the one that writes.
    """

    rank = 0
    is_first = True

    def gather(self, value: Any, same: str) -> list[Any]:
        """Give a value to all processes, and return that of each.

        Args:
            value: can be pickled.
            same: what has to be the same everywhere.

        Raises:
            PeerStepError: it is not, or another process has failed, or does something else.
        """
        return [value]

    def agree(self) -> None:
        """Wait until all processes have come so far.

        Raises:
            PeerStepError: another process has failed.
        """

    def write(self, write: Callable[[Stop], None], stop: Stop) -> None:
        """Write what the first process writes for all, or wait until it has.

        Raises:
            PeerStepError: it has failed.
        """
        write(stop)


class _Present(Others):
    """Other processes, which do the same.

    Args:
        communicator: talks to them.
        kind: what all of them do.
    """

    def __init__(self, communicator: Communicator, kind: Kind) -> None:
        self.rank = communicator.rank
        self.is_first = self.rank == 0
        self._notices = communicator.notices
        self._meeting = communicator.meeting(kind)
        self._name = str(self._meeting.intent.number)

    def fail(self, error: BaseException | str) -> None:
        """Have it fail on all processes."""
        self._meeting.fail(error)
        if self.is_first:  # the others may wait for the writing already; the event loop must not
            threading.Thread(target=self._notices.give, args=(self._name, f"{error}"), daemon=True).start()

    def gather(self, value: Any, same: str) -> list[Any]:
        on_cancel(partial(self._meeting.fail, _CANCELLED))
        own = base64.b64encode(pickle.dumps(value)).decode()
        texts = self._meeting.gather(json.dumps([same, own]))
        if texts is None:
            raise CalledOff
        all_same, values = zip(*map(json.loads, texts), strict=True)
        for rank, each in enumerate(all_same):
            if each != all_same[0]:
                raise PeerStepError(
                    rank, f"it has {each}, process 0 has {all_same[0]}", what="the checkpoint"
                )
        return [pickle.loads(base64.b64decode(each)) for each in values]

    def agree(self) -> None:
        if not self._meeting.vote():
            raise CalledOff

    def write(self, write: Callable[[Stop], None], stop: Stop) -> None:
        if not self.is_first:
            self._wait_written(stop)
            return
        try:
            write(stop)
        except BaseException as error:
            self._notices.give(self._name, _CANCELLED if isinstance(error, CalledOff) else f"{error}")
            raise
        self._notices.give(self._name, "")

    def _wait_written(self, stop: Stop) -> None:
        until = time.monotonic() + self._notices.timeout
        while (problem := self._notices.look(self._name)) is None:
            stop.check()
            if time.monotonic() > until:
                problem = f"it has not said for {self._notices.timeout:.0f} s that the checkpoint is written"
                break
            time.sleep(_POLL_SECONDS)
        if problem:
            raise PeerStepError(0, problem, what="the checkpoint")


@contextmanager
def others_of(shared: SharedSteps | None, *, is_load: bool) -> Iterator[Others]:
    """Give the other processes to a block that they run too; if it raises, it fails on all of them.

    Args:
        shared: None for one process.
        is_load: whether a checkpoint is loaded, not saved.
    """
    if shared is None:
        yield Others()
        return
    others = _Present(shared.communicator, Kind.LOAD if is_load else Kind.SAVE)
    try:
        yield others
    except BaseException as error:
        others.fail(_CANCELLED if _loops.ends_tasks(error) else error)
        raise
