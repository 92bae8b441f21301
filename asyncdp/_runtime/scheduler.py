"""What performs the decisions of the schedule: makes passes, starts lanes' threads, wakes who waits."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .. import _loops
from .._devices import LaneDevice, lane_device_for
from ..errors import AsyncDPError, DeviceLostError, NestedPassError, RuntimeClosedError, UnknownDeviceError
from .ambient import Ambient
from .hangs import GRACE_SECONDS, HangWatch
from .lane import LaneThread
from .passes import NextStage, Pass, Stage
from .schedule import Action, Advance, Clear, Complete, Discard, Enqueue, LaneState, Reject, Schedule, Stop
from .task import Lane, Setting, Task, this_thread


class Scheduler(HangWatch):
    """The lanes of one runtime, and all that happens on them.

    Args:
        max_queue: tasks that may be queued on one lane.
        num_threads: intra-op threads for all CPU lanes together.
        grows: whether `lanes_for` makes the lanes that are missing.
        hang_timeout: seconds after which a task makes its lane suspect; None for never.
        spin: seconds that a lane spins before it sleeps.

    Attributes:
        lock: guards the schedule, the queues of the lanes and the progress of passes.
        closed_cause: why passes are rejected once the schedule is closed.
    """

    def __init__(
        self,
        max_queue: int,
        num_threads: int,
        *,
        grows: bool = False,
        hang_timeout: float | None = None,
        spin: float = 0.0,
    ) -> None:
        self.lock = threading.Lock()
        self.schedule = Schedule(max_queue)
        self.lanes: list[Lane] = []
        self.closed_cause = "the runtime is closed"
        self.hang_timeout = hang_timeout
        self._spin = spin
        self._is_stopped = threading.Event()
        self._grows = grows
        self._num_threads = num_threads
        self._lane_threads = num_threads
        self._threads: list[LaneThread] = []
        self._device_types = ["cpu"]
        self._captures = False
        self._lost: dict[int, str] = {}  # lanes, and the error that their devices were lost by
        self._to_wake: deque[Callable[[], None]] = deque()

    def add_lane(self, driver: LaneDevice) -> None:
        """Make and start a lane; the lock is held, or nobody else knows the runtime yet."""
        ordinal = sum(lane.device == driver.device for lane in self.lanes)
        lane = Lane(_lane_name(driver.device, ordinal), self.schedule.add_lane(), driver, self.schedule)
        thread = LaneThread(
            lane,
            self._device_types,
            self.lock,
            on_ended=self._on_ended,
            on_lost=self._on_lost,
            wake=self._wake,
            to_wake=self._to_wake,
            spin=self._spin,
        )
        lane._started = thread.started
        self.lanes.append(lane)
        self._threads.append(thread)
        self._captures = self._captures or driver.captures
        if driver.device.type not in self._device_types:
            self._device_types.append(driver.device.type)
        self._lane_threads = self.thread_share(sum(lane.device.type == "cpu" for lane in self.lanes))
        thread.start()

    def thread_share(self, num_lanes: int) -> int:
        """Return the intra-op threads for each of `num_lanes` CPU lanes that run at the same time."""
        return max(1, self._num_threads // (num_lanes or 1))

    def lanes_for(self, devices: Sequence[torch.device]) -> list[Lane]:
        """Return one lane for each entry of `devices`; a repeated device means several of its lanes.

        Raises:
            UnknownDeviceError: the runtime has no lane, or too few, on one of the devices.
        """
        found, missing = self._find_lanes(devices)
        if missing and self._grows:
            with self.lock:
                for device in self._find_lanes(devices)[1]:  # unless another thread was quicker
                    self.add_lane(lane_device_for(device))
            return self._find_lanes(devices)[0]
        if missing:
            names = ", ".join(lane.name for lane in self.lanes)
            raise UnknownDeviceError(str(missing[0]), f"the runtime has too few lanes on it, only [{names}]")
        return found

    def _find_lanes(self, devices: Sequence[torch.device]) -> tuple[list[Lane], list[torch.device]]:
        """Return one lane for each entry of `devices` as far as there are, and the entries that got none."""
        free = list(self.lanes)
        found, missing = [], []
        for device in devices:
            position = next((place for place, lane in enumerate(free) if lane.device == device), None)
            if position is None:
                missing.append(device)
            else:
                found.append(free.pop(position))
        return found, missing

    def least_busy(self, lanes: Sequence[Lane], count: int = 1) -> list[Lane]:
        """Return the `count` least busy open lanes among `lanes`, in their order."""
        with self.lock:
            indices = self.schedule.pick([lane._index for lane in lanes], count)
        return [self.lanes[index] for index in indices]

    def check_open(self) -> None:
        """Raise `RuntimeClosedError` if the runtime takes no more passes."""
        if self.schedule.is_closed:
            raise RuntimeClosedError(self.closed_cause)

    def check_not_nested(self) -> None:
        """Raise `NestedPassError` on a lane of this very runtime, which would wait for itself."""
        lane = this_thread.lane
        if lane is not None and lane in self.lanes:
            raise NestedPassError(lane.name)

    def ambient(self) -> Ambient:
        """Return what this thread and task have switched on now, for a later pass."""
        return Ambient(self._device_types)

    async def run(
        self,
        stage: Stage,
        following: Sequence[NextStage] = (),
        *,
        num_threads: int | None = None,
        ambient: Ambient | None = None,
        lanes: Sequence[Lane] | None = None,
    ) -> list[Any]:
        """Run stages of tasks, each after all of the one before.

        The first stage waits in order of arrival for room in its lanes' queues. A later one begins without
        a detour through the event loop: the lane that ends last queues it. Once a task has failed or the
        caller is cancelled, no further stage begins, and the pass ends when what runs has drained.

        Args:
            stage: the first stage.
            following: makes each of the others.
            num_threads: intra-op threads of each task on a CPU lane; a lane's share of the cores if None.
            ambient: of an earlier call of `ambient`; what is switched on now if None.
            lanes: all that any stage may use. Without it, later stages must not read the caller's
                tensors on another device than the first's.

        Returns:
            What the tasks of the last stage returned.

        Raises:
            NestedPassError, RuntimeClosedError, DeviceLostError: it cannot run.
            BaseException: the first failure in time, the very object a lane raised.
        """
        self.check_not_nested()
        pass_ = self.make(stage, following, num_threads, ambient, lanes)
        pass_.completion = completion = _loops.current().completion(partial(self.cancel, pass_))
        self.submit(pass_)
        try:
            await completion
        except BaseException:
            # The traceback of a failure refers to this pass: they would keep each other alive.
            pass_.failures = ()
            raise
        if not pass_.failures:
            return pass_.results
        error = pass_.take_failure()
        assert error is not None
        try:
            raise error
        finally:
            # The traceback refers to this frame: without this, frame and error keep each other alive.
            del error, self, pass_

    def start(
        self,
        task: Task,
        on_end: Callable[[Pass], object],
        following: Sequence[NextStage] = (),
        *,
        num_threads: int,
        ambient: Ambient,
    ) -> Pass:
        """Begin a pass that no caller awaits; `on_end` is called with it on this event loop.

        Nothing is checked that stays the same for one event loop: call `check_not_nested` before the first.

        Args:
            task: the first stage.
            on_end: must not raise; state, results and `take_failure` of the pass are its outcome.
            following: makes each of the others.
            num_threads: intra-op threads on a CPU lane.
            ambient: for this pass alone.
        """
        pass_ = self.make([task], following, num_threads, ambient, None)
        pass_.completion = _loops.current().callback(partial(on_end, pass_))
        self.submit(pass_)
        return pass_

    def cancel(self, pass_: Pass) -> None:
        """Discard what has not begun; the pass ends once what runs has drained."""
        with self.lock:
            self._perform(self.schedule.cancel(pass_))
            self._abandon_cancelled()
        self._wake()
        if pass_.on_cancel is not None:
            pass_.on_cancel()

    def close(self, timeout: float | None) -> None:
        """Take nothing more, and wait for the lanes' threads, `timeout` seconds in all if given."""
        with self.lock:
            self._perform(self.schedule.close())
            for thread in self._threads:
                if any(task.is_abandoned for task in thread.started):
                    thread.give_up()
        self._wake()
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    async def aclose(self, timeout: float | None = None) -> None:
        """Take nothing more, and wait until every lane's thread has ended.

        After `timeout` seconds, or some after a cancellation, what still runs is abandoned.
        """
        timers: list[threading.Timer] = []

        def abandon_after(seconds: float) -> None:
            timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self.abandon)
            timer.daemon = True
            timer.start()
            timers.append(timer)

        def close_then_finish() -> None:
            self.close(None)
            ended.finish()

        ended = _loops.current().completion(partial(abandon_after, GRACE_SECONDS))
        if timeout is not None:
            abandon_after(timeout)
        # Joining blocks, and the loop must not.
        threading.Thread(target=close_then_finish, name="asyncdp-close", daemon=True).start()
        try:
            await ended
        finally:
            for timer in timers:
                timer.cancel()

    def make(
        self,
        stage: Stage,
        following: Sequence[NextStage],
        num_threads: int | None,
        ambient: Ambient | None,
        lanes: Sequence[Lane] | None,
    ) -> Pass:
        """Make a pass of what `run` describes; give it a completion before it is submitted."""
        captured = self._capture(lanes or [task.lane for task in stage]) if self._captures else {}
        setting = Setting(ambient or Ambient(self._device_types), num_threads or self._lane_threads, captured)
        pass_ = Pass((), len(following), following=following, setting=setting)
        pass_.lanes = _prepare(pass_, stage)
        return pass_

    def submit(self, pass_: Pass) -> None:
        """Begin a pass; from any thread."""
        with self.lock:
            self._perform(self.schedule.submit(pass_))
        self._wake()

    def _capture(self, lanes: Iterable[Lane]) -> Mapping[torch.device, Any]:
        """Note, on the submitting thread, what tasks on the devices of `lanes` have to wait for.

        A device may prove to be lost only here, while no lane uses it.
        """
        captured: dict[torch.device, Any] = {}
        for lane in lanes:
            if lane.device in captured or lane.state in (LaneState.CLOSED, LaneState.LOST):
                continue
            try:
                captured[lane.device] = lane._driver.capture()
            except Exception as error:
                if not lane._driver.lost(error):
                    raise
                self._on_lost(lane, error)
        return captured

    def _wake(self) -> None:
        """Wake the lanes and event loops that have something to do; the lock is not held."""
        while self._to_wake:
            try:
                wake = self._to_wake.popleft()
            except IndexError:
                return  # another thread was quicker
            wake()

    def _on_lost(self, lane: Lane, error: BaseException) -> None:
        with self.lock:
            self._mark_lost(lane, error)
        self._wake()

    # All that follows is called with the lock held, on whichever thread.

    def _perform(self, actions: Iterable[Action]) -> None:
        """Do what the schedule decided."""
        for action in actions:
            match action:
                case Enqueue(pass_, first):
                    assert isinstance(pass_, Pass)
                    for task in pass_.stage:
                        self._threads[task.lane._index].put(task, first=first)
                case Complete(pass_):
                    self._complete(pass_)
                case Advance(pass_, lane):
                    self._advance(pass_, self.lanes[lane])
                case Reject(pass_, lane):
                    assert isinstance(pass_, Pass)
                    pass_.failures = (*pass_.failures, (None, self._rejection(lane)))
                    self._complete(pass_)
                case Discard(pass_):
                    assert isinstance(pass_, Pass)
                    for task in pass_.stage:
                        if self._threads[task.lane._index].remove(task):
                            self._discard(task, None)
                case Clear(lane):
                    for task in self._threads[lane].clear():
                        self._discard(task, self._lost_error(lane))
                case Stop():
                    self._is_stopped.set()
                    for thread in self._threads:
                        thread.stop()

    def _on_ended(self, task: Task) -> None:
        """Take note of a task's end."""
        pass_ = task.pass_
        assert isinstance(pass_, Pass)
        started = self._threads[task.lane._index].started
        del started[task]
        task.function = None
        if started or self.schedule.suspects:
            self._note_answer(task.lane)
        if task.is_abandoned:
            task.value = task.error = None
            return
        error, task.error = task.error, None
        if error is None:
            pass_.results[task.index] = task.value
            task.value = None
        else:
            pass_.failures = (*pass_.failures, (task.place, error))
            if task.lost:
                self._mark_lost(task.lane, error)
        self._perform(self.schedule.on_task_done(pass_, task.lane._index, failed=error is not None))

    def _discard(self, task: Task, error: BaseException | None) -> None:
        """Take note of a task that will not run, because of `error` or a cancellation."""
        pass_ = task.pass_
        assert isinstance(pass_, Pass)
        task.call = task.function = None
        if error is not None:
            pass_.failures = (*pass_.failures, (task.place, error))
        self._perform(self.schedule.on_task_done(pass_, task.lane._index, failed=error is not None))

    def _advance(self, pass_: Any, lane: Lane) -> None:
        """Make the next stage of a pass; `lane` ended last."""
        make_stage, *pass_.following = pass_.following
        try:
            lanes = _prepare(pass_, make_stage(pass_.results, lane))
        except BaseException as error:
            pass_.failures = (*pass_.failures, (f"lane {lane.name}", error))
            actions = self.schedule.on_stage_failed(pass_)
        else:
            actions = self.schedule.on_stage_made(pass_, lanes)
        self._perform(actions)

    def _complete(self, pass_: Any) -> None:
        # Nothing of an ended pass but its result may stay referenced by the task that awaits it.
        if pass_.has_failed or pass_.failures or pass_.is_cancelled:
            pass_.results = []
        pass_.stage = pass_.following = ()
        pass_.setting = pass_.on_cancel = None
        self._to_wake.append(pass_.completion.finish)

    def _mark_lost(self, lane: Lane, error: BaseException) -> None:
        """Close every lane of a lost device and fail what is queued on them."""
        for other in self.lanes:
            if other.device == lane.device and other._index not in self._lost:
                self._lost[other._index] = str(error).partition("\n")[0]
                self._perform(self.schedule.mark_lost(other._index))

    def _lost_error(self, lane: int) -> DeviceLostError:
        # Made anew for each pass: one that is kept would keep every traceback it was raised with.
        return DeviceLostError(self.lanes[lane].name, self._lost[lane])

    def _rejection(self, lane: int | None) -> AsyncDPError:
        if lane is not None and lane in self._lost:
            return self._lost_error(lane)
        return RuntimeClosedError(self.closed_cause)


def _prepare(pass_: Pass, stage: Stage) -> list[int]:
    """Make `stage` the pass's own; return the lanes of its tasks."""
    setting = pass_.setting
    assert setting is not None
    lanes = []
    for index, task in enumerate(stage):
        task.index, task.pass_, task.setting = index, pass_, setting
        assert task.function is not None
        # Here, and not when it begins: tasks before it may change their context variables.
        task.call = setting.ambient.bind(task.function, index, task.lane.device)
        lanes.append(task.lane._index)
    pass_.stage = stage
    pass_.results = [None] * len(stage)
    return lanes


def _lane_name(device: torch.device, ordinal: int) -> str:
    if device.index is None:
        return f"{device.type}:{ordinal}"
    return str(device) if ordinal == 0 else f"{device}/{ordinal}"
