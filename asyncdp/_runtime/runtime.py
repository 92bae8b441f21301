"""The runtime: owns lanes and performs what the schedule decides."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from .. import _devices, _kernels
from .._devices import Devices, LaneDevice, parse_devices
from ..errors import (
    AsyncDPError,
    DeviceLostError,
    NestedPassError,
    QueueFullError,
    RuntimeClosedError,
    UnknownDeviceError,
)
from .completion import Completion, new_completion
from .lane import Lane, current_lane
from .passes import NextStage, Pass, PassState, Stage
from .schedule import Action, Admit, LaneState, Refuse, Schedule

T = TypeVar("T")

DEFAULT_MAX_QUEUE = 1024
_EXIT_SECONDS = 5.0


@dataclass(frozen=True)
class LaneStatistics:
    """One lane at one moment."""

    name: str
    device: torch.device
    state: LaneState
    num_queued: int
    """Works that are queued or running."""
    num_done: int
    busy_seconds: float
    """Time spent in works since the lane was made, in seconds."""


@dataclass(frozen=True)
class RuntimeStatistics:
    """A runtime at one moment; the counts run from its creation."""

    lanes: tuple[LaneStatistics, ...]
    num_running: int
    """Passes admitted and not yet ended."""
    num_waiting: int
    """Passes that wait for room in a lane's queue."""
    num_done: int
    num_failed: int
    num_cancelled: int
    paths: _kernels.PathStatistics
    """Which way tensors took between CUDA devices, counted over the whole process."""


class Core:
    """What lanes and passes share with the runtime, but for the handle a user holds.

    `lock` guards the schedule, the queues of the lanes and the progress of passes.
    """

    def __init__(self, max_queue: int) -> None:
        self.lock = threading.Lock()
        self.schedule = Schedule(0, max_queue)
        self.lanes: list[Lane] = []
        self.device_types: tuple[str, ...] = ("cpu",)
        self.captures = False
        self.num_cpu_lanes = 0
        self.closed_cause = "the runtime is closed"
        self.num_running = 0
        self.counts: Counter[PassState] = Counter()
        self.lost: dict[int, AsyncDPError] = {}
        self.to_wake: deque[Callable[[], None]] = deque()
        self._stopped = False

    def add_lane(self, driver: LaneDevice) -> Lane:
        """Make and start a lane; the lock is held, or nobody else knows the runtime yet."""
        index = self.schedule.add_lane()
        ordinal = sum(lane.device == driver.device for lane in self.lanes)
        lane = Lane(_lane_name(driver.device, ordinal), index, driver, self)
        self.lanes.append(lane)
        self.captures = self.captures or driver.captures
        self.num_cpu_lanes += driver.device.type == "cpu"
        if driver.device.type not in self.device_types:
            self.device_types += (driver.device.type,)
        lane.start()
        return lane

    # The following are called with the lock held.

    def submit(self, one: Pass) -> None:
        """Give a pass to the schedule."""
        self.num_running += 1
        action = self.schedule.submit(one, one.lanes)
        if action is not None:
            self.act((action,))

    def act(self, actions: Iterable[Action]) -> None:
        """Perform what the schedule decided."""
        for action in actions:
            one = action.ticket
            assert isinstance(one, Pass)
            if isinstance(action, Admit):
                one.enqueue()
            else:
                one.refuse(self._refusal(action))

    def proceed(self, one: Pass) -> AsyncDPError | None:
        """Take places for the next stage of an admitted pass, or say why that is impossible."""
        lane = self.schedule.proceed(one.lanes)
        return None if lane is None else self.lost[lane]

    def lose(self, lane: Lane, cause: BaseException | None) -> None:
        """Close every lane of a lost device and fail what is queued on them."""
        for other in self.lanes:
            if other.device != lane.device or self.schedule.state(other.index) is LaneState.LOST:
                continue
            self.lost[other.index] = DeviceLostError(other.name, str(cause).partition("\n")[0])
            self.act(self.schedule.lose(other.index))
            for work in other.clear():
                work.owner.drop(work, self.lost[other.index])

    def close(self) -> None:
        """Take nothing more; lanes stop once the last pass has ended."""
        if not self.schedule.closed:
            self.act(self.schedule.close())
            self._stop_if_idle()

    def _refusal(self, action: Refuse) -> AsyncDPError:
        if action.lane is not None and action.lane in self.lost:
            return self.lost[action.lane]
        return RuntimeClosedError(self.closed_cause)

    def _stop_if_idle(self) -> None:
        if self.schedule.closed and self.num_running == 0 and not self._stopped:
            self._stopped = True
            for lane in self.lanes:
                lane.stop()

    def finished(self, one: Pass, completion: Completion) -> None:
        """Count a pass that has ended; its task is woken after the lock is released."""
        self.counts[one.state] += 1
        self.num_running -= 1
        self.to_wake.append(completion.finish)
        self._stop_if_idle()

    # Called without the lock.

    def wake(self) -> None:
        """Wake the lanes and tasks that have something to do.

        Not done under the lock: whoever wakes takes it first of all, and would have to wait for it.
        """
        while self.to_wake:
            try:
                wake = self.to_wake.popleft()
            except IndexError:
                return  # another thread was quicker
            wake()

    def shut_down(self, timeout: float | None) -> None:
        """Close and wait for the lanes' threads, `timeout` seconds in all if given."""
        with self.lock:
            self.close()
        self.wake()
        deadline = None if timeout is None else time.monotonic() + timeout
        for lane in self.lanes:
            lane.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    async def aclose(self) -> None:
        """Close and wait until every lane's thread has ended."""
        ended = new_completion(lambda: None)

        def join_then_finish() -> None:
            self.shut_down(None)
            ended.finish()

        # Joining blocks, and the loop must not.
        thread = threading.Thread(target=join_then_finish, name="asyncdp-close", daemon=True)
        await ended.wait(thread.start)


def _lane_name(device: torch.device, ordinal: int) -> str:
    if device.index is None:
        return f"{device.type}:{ordinal}"
    return str(device) if ordinal == 0 else f"{device}/{ordinal}"


_cores: weakref.WeakSet[Core] = weakref.WeakSet()


class Runtime:
    """A set of lanes and the scheduler over them.

    Use it as an async context manager on asyncio or trio; on leaving, passes under way are drained
    and the lanes' threads end. One runtime may serve several event loops in several threads.

    Args:
        devices: one lane per entry; see `asyncdp.parse_devices`. Entries of a sequence may also be
            the fake devices of `asyncdp.testing`.
        max_queue: works that may be queued on one lane; more wait in order of arrival.

    Raises:
        NoCudaDeviceError, UnknownDeviceError, NoDevicesError: as `asyncdp.parse_devices`.
        ValueError: `max_queue` is negative.
    """

    def __init__(
        self, devices: Devices | Sequence[LaneDevice] = None, *, max_queue: int = DEFAULT_MAX_QUEUE
    ) -> None:
        if max_queue < 0:
            raise ValueError(f"max_queue must be 0 or more, but got {max_queue}. 0 queues nothing.")
        drivers = _drivers(devices)
        # Read here, in the caller's thread: what torch would use for one operation of this program.
        self._num_threads = torch.get_num_threads()
        self._core = Core(max_queue)
        for driver in drivers:
            self._core.add_lane(driver)
        _cores.add(self._core)
        weakref.finalize(self, _close_soon, self._core).atexit = False

    def __repr__(self) -> str:
        states = Counter(self._core.schedule.state(lane.index) for lane in self._core.lanes)
        told = ", ".join(f"{count} {state.value}" for state, count in states.items()) or "no lanes"
        names = ", ".join(lane.name for lane in self._core.lanes)
        return (
            f"<Runtime [{names}]: {told}; "
            f"{self._core.num_running - self._core.schedule.num_waiting} passes running, "
            f"{self._core.schedule.num_waiting} waiting>"
        )

    async def __aenter__(self) -> Runtime:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Take no more work, drain what was admitted, end the lanes' threads.

        Passes that still wait for room fail with `RuntimeClosedError`.
        """
        await self._core.aclose()

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes, in the order of `devices`."""
        return tuple(self._core.lanes)

    @property
    def num_intra_op_threads(self) -> int:
        """Each CPU lane's share of the cores, so that lanes times threads = cores."""
        return self.thread_share(self._core.num_cpu_lanes)

    def thread_share(self, num_lanes: int) -> int:
        """Intra-op threads for each of `num_lanes` CPU lanes that run at the same time."""
        return max(1, self._num_threads // max(1, num_lanes))

    def lanes_for(self, devices: Sequence[torch.device]) -> list[Lane]:
        """One lane for each entry of `devices`; a repeated device means several of its lanes.

        Raises:
            UnknownDeviceError: the runtime has no lane, or too few, on one of the devices.
        """
        free = list(self._core.lanes)
        found = []
        for device in devices:
            lane = next((lane for lane in free if lane.device == device), None)
            if lane is None:
                raise UnknownDeviceError(str(device), f"{self!r} has too few lanes on it")
            free.remove(lane)
            found.append(lane)
        return found

    def least_busy(self, lanes: Sequence[Lane], count: int = 1) -> list[Lane]:
        """The `count` least busy open lanes among `lanes`, in their order."""
        with self._core.lock:
            indices = self._core.schedule.pick([lane.index for lane in lanes], count)
        return [self._core.lanes[index] for index in indices]

    async def run(
        self, function: Callable[..., T], *args: Any, lane: Lane | None = None, num_threads: int | None = None
    ) -> T:
        """Call `function(*args)` on a lane, under the caller's grad mode, autocast and context.

        Args:
            function: called on the lane's thread, with the lane's stream current on CUDA.
            *args: its arguments; kept alive until the device is done with them.
            lane: the lane to use; the least busy one if None.
            num_threads: intra-op threads on a CPU lane; the lane's share of the cores if None.

        Returns:
            What `function` returned, ready for use on the caller's stream.

        Raises:
            RuntimeClosedError: the runtime takes no more work.
            DeviceLostError: the lane's device was lost.
            BaseException: whatever `function` raised, the very object.
        """
        if lane is None:
            lane = self.least_busy(self._core.lanes)[0]
        stage = [(lane, lambda: function(*args))]
        return (await self.run_pass(stage, num_threads=num_threads))[0]  # type: ignore[no-any-return]

    async def run_pass(
        self,
        stage: Stage,
        following: Sequence[NextStage] = (),
        *,
        num_threads: int | None = None,
    ) -> list[Any]:
        """Run stages of work, each after all of the one before, and return the last one's results.

        The first stage waits in order of arrival for room in its lanes' queues.
        """
        self._refuse_nested()
        one = Pass(self._core, stage, following, num_threads or self.num_intra_op_threads)
        return await one.run()

    async def run_pass_nowait(self, stage: Stage, following: Sequence[NextStage] = ()) -> list[Any]:
        """As `run_pass`, but raise `QueueFullError` instead of waiting for room."""
        with self._core.lock:
            full = [
                lane
                for lane, _ in stage
                if self._core.schedule.load(lane.index) > self._core.schedule.max_queue
            ]
        if full:
            raise QueueFullError(f"lane {full[0].name}", self._core.schedule.max_queue)
        return await self.run_pass(stage, following)

    async def warm_up(self) -> None:
        """Build and load the kernels of every device now, on lanes, so that no later pass has to.

        Takes seconds for a CUDA device whose kernels are not in the disk cache yet; nothing elsewhere.
        """
        one_per_device = {lane.device: lane for lane in self._core.lanes}
        await self.run_pass(
            [(lane, partial(_kernels.warm_up, device)) for device, lane in one_per_device.items()]
        )

    def statistics(self) -> RuntimeStatistics:
        """A snapshot of all lanes and counts."""
        core = self._core
        with core.lock:
            lanes = tuple(
                LaneStatistics(
                    name=lane.name,
                    device=lane.device,
                    state=core.schedule.state(lane.index),
                    num_queued=core.schedule.load(lane.index),
                    num_done=lane.num_done,
                    busy_seconds=lane.busy_seconds,
                )
                for lane in core.lanes
            )
            return RuntimeStatistics(
                lanes=lanes,
                num_running=core.num_running - core.schedule.num_waiting,
                num_waiting=core.schedule.num_waiting,
                num_done=core.counts[PassState.DONE],
                num_failed=core.counts[PassState.FAILED],
                num_cancelled=core.counts[PassState.CANCELLED],
                paths=_kernels.statistics(),
            )

    def _refuse_nested(self) -> None:
        lane = current_lane()
        if lane is not None and lane in self._core.lanes:
            raise NestedPassError(lane.name)


class _DefaultRuntime(Runtime):
    """The process's own runtime: grows lanes as they are asked for, and is never closed before exit."""

    def __init__(self) -> None:
        super().__init__([_devices.lane_device_for(device) for device in parse_devices()])

    def lanes_for(self, devices: Sequence[torch.device]) -> list[Lane]:
        with self._core.lock:
            missing = Counter(devices) - Counter(lane.device for lane in self._core.lanes)
            for device, count in missing.items():
                for _ in range(count):
                    self._core.add_lane(_devices.lane_device_for(device))
        return super().lanes_for(devices)


_default: _DefaultRuntime | None = None
_default_lock = threading.Lock()


def default_runtime() -> Runtime:
    """The process's own runtime, made at first use, shared by every event loop and thread."""
    global _default
    with _default_lock:
        if _default is None:
            _default = _DefaultRuntime()
        return _default


def _drivers(devices: Devices | Sequence[LaneDevice]) -> list[LaneDevice]:
    entries: Sequence[Any] = devices if isinstance(devices, (list, tuple)) else [devices]
    if len(entries) > 0 and all(isinstance(entry, LaneDevice) for entry in entries):
        return list(entries)
    return [_devices.lane_device_for(device) for device in parse_devices(devices)]  # type: ignore[arg-type]


def _close_soon(core: Core) -> None:
    # A garbage collection may call this anywhere, also where this thread holds the very lock.
    threading.Thread(target=core.shut_down, args=(0.0,), name="asyncdp-close", daemon=True).start()


def _shut_down_all() -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for core in list(_cores):
        core.shut_down(max(0.0, deadline - time.monotonic()))


def _forget_after_fork() -> None:
    """In a forked child the lanes' threads do not exist: start anew, and refuse the old runtimes."""
    global _default, _default_lock
    _default = None
    _default_lock = threading.Lock()
    for core in list(_cores):
        core.lock = threading.Lock()
        core.closed_cause = (
            "the runtime was made before a fork, and its threads do not exist in this child process"
        )
        core.schedule.closed = True
    _devices.forget_threads()


atexit.register(_shut_down_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
