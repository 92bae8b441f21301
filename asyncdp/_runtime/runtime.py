"""The runtime: owns lanes and performs what the schedule decides."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from .. import _devices, _kernels
from .._devices import Devices, LaneDevice, parse_devices
from .._devices.threads import end_own_team
from ..errors import NestedPassError, RuntimeClosedError, UnknownDeviceError
from .ambient import Ambient
from .core import Core
from .lane import Lane, current_lane
from .passes import NextStage, Pass, PassState, Stage
from .schedule import LaneState

T = TypeVar("T")

DEFAULT_MAX_QUEUE = 1024


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


cores: weakref.WeakSet[Core] = weakref.WeakSet()
"""Every runtime of the process that may still be alive."""


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
        end_own_team()
        # Read here, in the caller's thread: what torch would use for one operation of this program.
        self._core = Core(max_queue, torch.get_num_threads())
        for driver in drivers:
            self._core.add_lane(driver)
        cores.add(self._core)
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

    async def __aexit__(self, *exc_info: object) -> None:
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
        return self._core.lane_threads

    def thread_share(self, num_lanes: int) -> int:
        """Intra-op threads for each of `num_lanes` CPU lanes that run at the same time."""
        return self._core.thread_share(num_lanes)

    def lanes_for(self, devices: Sequence[torch.device]) -> list[Lane]:
        """One lane for each entry of `devices`; a repeated device means several of its lanes.

        Raises:
            UnknownDeviceError: the runtime has no lane, or too few, on one of the devices.
        """
        found, missing = self._find_lanes(devices)
        if missing:
            raise UnknownDeviceError(str(missing[0]), f"{self!r} has too few lanes on it")
        return found

    def _find_lanes(self, devices: Sequence[torch.device]) -> tuple[list[Lane], list[torch.device]]:
        """One lane for each entry of `devices` as far as there are, and the entries that got none."""
        free = list(self._core.lanes)
        found, missing = [], []
        for device in devices:
            position = next((place for place, lane in enumerate(free) if lane.device == device), None)
            if position is None:
                missing.append(device)
            else:
                found.append(free.pop(position))
        return found, missing

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
        self.refuse_nested()
        stage = [(lane, partial(function, *args) if args else function)]
        one = Pass(self._core, stage, (), num_threads or self._core.lane_threads, None)
        return (await one.run())[0]  # type: ignore[no-any-return]

    def start(
        self,
        function: Callable[[], Any],
        on_end: Callable[[Pass], object],
        *,
        lane: Lane,
        num_threads: int,
        ambient: Ambient,
    ) -> Pass:
        """Have `function` called on a lane without a task that waits: `on_end` is told on this event loop.

        What the pass came to are its state, `take_failure` and `results`. An `ambient` is for one pass.
        Nothing is looked at that stays the same for one event loop: call `refuse_nested` before the first.
        """
        one = Pass(self._core, [(lane, function)], (), num_threads, None, ambient, on_end=on_end)
        one.submit()
        return one

    async def run_pass(
        self,
        stage: Stage,
        following: Sequence[NextStage] = (),
        *,
        num_threads: int | None = None,
        replica_stage: int | None = None,
        ambient: Ambient | None = None,
        lanes: Sequence[Lane] | None = None,
    ) -> list[Any]:
        """Run stages of work, each after all of the one before, and return the last one's results.

        The first stage waits in order of arrival for room in its lanes' queues. `replica_stage` tells
        which of the stages runs replicas, for the notes on exceptions. `ambient` is what `ambient()`
        gave earlier, for a pass that had to wait for its turn. `lanes` are all that any stage may use;
        without it, later stages must not read the caller's tensors on another device than the first's.
        """
        self.refuse_nested()
        num_threads = num_threads or self._core.lane_threads
        one = Pass(self._core, stage, following, num_threads, replica_stage, ambient, lanes)
        return await one.run()

    def refuse_closed(self) -> None:
        """Raise `RuntimeClosedError` if the runtime takes no more work, as any pass would."""
        if self._core.schedule.closed:
            raise RuntimeClosedError(self._core.closed_cause)

    def ambient(self) -> Ambient:
        """What this thread and task have switched on now, for a later `run_pass`."""
        return Ambient(self._core.device_types)

    async def run_pass_nowait(self, stage: Stage, following: Sequence[NextStage] = ()) -> list[Any]:
        """As `run_pass`, but raise `QueueFullError` instead of waiting for room."""
        self.refuse_nested()
        one = Pass(self._core, stage, following, self._core.lane_threads, None)
        return await one.run(waits=False)

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

    def refuse_nested(self) -> None:
        """Raise `NestedPassError` on a lane of this very runtime, which would wait for itself."""
        lane = current_lane()
        if lane is not None and lane in self._core.lanes:
            raise NestedPassError(lane.name)


def _drivers(devices: Devices | Sequence[LaneDevice]) -> list[LaneDevice]:
    entries: Sequence[Any] = devices if isinstance(devices, (list, tuple)) else [devices]
    if len(entries) > 0 and all(isinstance(entry, LaneDevice) for entry in entries):
        return list(entries)
    return [_devices.lane_device_for(device) for device in parse_devices(devices)]  # type: ignore[arg-type]


def _close_soon(core: Core) -> None:
    # A garbage collection may call this anywhere, also where this thread holds the very lock.
    threading.Thread(target=core.shut_down, args=(0.0,), name="asyncdp-close", daemon=True).start()
