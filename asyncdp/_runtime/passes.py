"""A pass: passive data, which the scheduler moves along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._loops import Finishable
from ..errors import StopIterationInLaneError
from .schedule import Progress
from .task import Lane, Setting, Task

Stage = Sequence[Task]
"""What each lane does; the tasks run at the same time, one after another where a lane repeats."""

NextStage = Callable[[list[Any], Lane], Stage]
"""Makes the following stage from the results of one and the lane that ended last.

Called under the scheduler's lock: it only makes tasks and does no work itself. After a stage of no
tasks the lane is the runtime's first.
"""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Pass(Progress):
    """The stages of one pass.

    Attributes:
        stage: the tasks of the current stage.
        following: makes each of the others, the next one first.
        setting: what all tasks run under.
        completion: finished once the pass has ended.
        results: what the tasks of the current stage returned.
        failures: where each task failed, if on a lane, and its error; in the order of time.
    """

    stage: Stage = ()
    following: Sequence[NextStage] = ()
    setting: Setting | None = None
    completion: Finishable | None = None
    results: list[Any] = field(default_factory=list)
    failures: Sequence[tuple[str | None, BaseException]] = ()

    def __repr__(self) -> str:
        return f"<Pass {self.state.value}: {self.num_tasks_left} of {len(self.stage)} tasks left>"

    def take_failure(self) -> BaseException | None:
        """Return the first failure of an ended pass, once, with notes on where and what else failed."""
        failures, self.failures = self.failures, ()
        return _first_failure(failures) if failures else None


def _first_failure(failures: Sequence[tuple[str | None, BaseException]]) -> BaseException:
    place, error = failures[0]
    if isinstance(error, StopIteration):
        wrapped = StopIterationInLaneError()
        wrapped.__cause__ = error
        error = wrapped
    if place is not None:
        _add_note(error, f"in {place}" if place.startswith("replica") else f"on {place}")
    for other_place, other in failures[1:]:
        if other_place is not None and other is not error:
            _add_note(error, f"also failed: {other_place}: {other!r}")
    return error


def _add_note(error: BaseException, note: str) -> None:
    # An exception object that is raised again and again must not collect notes without end.
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
