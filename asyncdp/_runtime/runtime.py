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

from .._checks import as_optional_seconds, check_counts, check_functions, is_number, shown
from .._devices import Devices, LaneDevice, PathStatistics, lane_device_for, parse_devices, path_statistics
from .._devices.threads import end_own_team
from .hangs import grace_of
from .schedule import PassState
from .scheduler import Scheduler
from .spin import MAX_SECONDS
from .task import Lane, LaneStatistics, Task, driver_of

T = TypeVar("T")

DEFAULT_MAX_QUEUE = 1024
_MOST_THREADS = 1024  # a number that torch refuses would end the lane


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
    paths: PathStatistics
    """Which way tensors took between CUDA devices, counted over the whole process."""


schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()
"""Every runtime of the process that may still be alive."""


class Runtime:
    """A set of lanes and the scheduler over them.

    Use it as an async context manager on asyncio or trio; on leaving, passes under way are drained
    and the lanes' threads end. One runtime may serve several event loops in several threads.

    Args:
        devices: one lane per entry; see `asyncdp.parse_devices`. Entries of a sequence may also be
            the fake devices of `asyncdp.testing`.
        max_queue: tasks that may be queued on one lane; more wait in order of arrival.
        hang_timeout: seconds after which a running task makes its lane suspect: other lanes are preferred
            until it has ended, and a cancellation no longer waits for it. None waits for ever.
        spin: seconds that the thread of a lane spins for more to do before it sleeps, at most 0.1; each
            lane takes a core for that time after every task. On an idle machine a lone pass then begins
            sooner. 0 sleeps at once.

    Raises:
        NoCudaDeviceError, UnknownDeviceError, NoDevicesError: as `asyncdp.parse_devices`.
        ValueError: `max_queue` is negative, `hang_timeout` is not positive, or `spin` out of range.
    """

    def __init__(
        self,
        devices: Devices | Sequence[LaneDevice] = None,
        *,
        max_queue: int = DEFAULT_MAX_QUEUE,
        hang_timeout: float | None = None,
        spin: float = 0.0,
    ) -> None:
        check_counts(least=0, max_queue=max_queue)
        hang_timeout = as_optional_seconds("hang_timeout", hang_timeout, positive=True)
        if not (is_number(spin) and 0 <= spin <= MAX_SECONDS):
            raise ValueError(f"spin is in seconds, from 0 to {MAX_SECONDS}, but got {shown(spin)}.")
        self._start(_drivers(devices), max_queue, grows=False, hang_timeout=hang_timeout, spin=float(spin))

    def _start(
        self,
        drivers: Sequence[LaneDevice],
        max_queue: int,
        *,
        grows: bool,
        hang_timeout: float | None = None,
        spin: float = 0.0,
    ) -> None:
        end_own_team()  # of this thread, which made the module, most likely
        # Read here, in the caller's thread: what torch would use for one operation of this program.
        self._scheduler = Scheduler(
            max_queue, torch.get_num_threads(), grows=grows, hang_timeout=hang_timeout, spin=spin
        )
        for driver in drivers:
            self._scheduler.add_lane(driver)
        if hang_timeout is not None:
            self._scheduler.watch()
        schedulers.add(self._scheduler)
        weakref.finalize(self, _close_soon, self._scheduler).atexit = False

    def __repr__(self) -> str:
        states = Counter(lane.state for lane in self.lanes)
        counts = ", ".join(f"{count} {state.value}" for state, count in states.items()) or "no lanes"
        names = ", ".join(lane.name for lane in self.lanes)
        schedule = self._scheduler.schedule
        return (
            f"<Runtime [{names}]: {counts}; "
            f"{schedule.num_running} passes running, {schedule.num_waiting} waiting>"
        )

    async def __aenter__(self) -> Runtime:
        return self

    async def __aexit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        await self.aclose(grace_of(exc))

    async def aclose(self, timeout: float | None = None) -> None:
        """Take no more passes, drain what was admitted, end the lanes' threads.

        Passes that still wait for room fail with `RuntimeClosedError`.

        Args:
            timeout: seconds after which passes that still run fail with `LaneHungError` and are abandoned,
                which a warning says; None for ever. A cancellation of this call or of the `async with`
                block makes it 2 s more.
        """
        await self._scheduler.aclose(as_optional_seconds("timeout", timeout))

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes, in the order of `devices`."""
        return tuple(self._scheduler.lanes)

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
            RuntimeClosedError: the runtime takes no more passes.
            DeviceLostError: the lane's device was lost.
            TypeError: `function` cannot be called, or `lane` is none.
            ValueError: `lane` is one of another runtime, or `num_threads` is no count.
            BaseException: whatever `function` raised, the very object.
        """
        check_functions(function=function)
        if num_threads is not None:
            check_counts(most=_MOST_THREADS, num_threads=num_threads)
        if lane is not None:
            self._check_lane(lane)
        scheduler = self._scheduler
        if lane is None:
            lane = scheduler.least_busy(scheduler.lanes)[0]
        task = Task(lane, partial(function, *args) if args else function)
        results = await scheduler.run([task], num_threads=num_threads)
        return results[0]  # type: ignore[no-any-return]

    def _check_lane(self, lane: object) -> None:
        if not isinstance(lane, Lane):
            raise TypeError(f"lane must be a Lane or None, but got {shown(lane)}. Take one of runtime.lanes.")
        if not any(lane is each for each in self._scheduler.lanes):
            raise ValueError(f"{shown(lane)} is no lane of {self!r}. Take one of its own: runtime.lanes.")

    async def warm_up(self) -> None:
        """Build and load the kernels of every device now, on lanes, so that no later pass has to.

        Takes seconds for a CUDA device whose kernels are not in the disk cache yet; nothing elsewhere.
        """
        one_per_device = {lane.device: lane for lane in self.lanes}
        await self._scheduler.run(
            [Task(lane, driver_of(lane).warm_up, "warm_up") for lane in one_per_device.values()]
        )

    def statistics(self) -> RuntimeStatistics:
        """Return a snapshot of all lanes and counts."""
        with self._scheduler.lock:
            schedule = self._scheduler.schedule
            return RuntimeStatistics(
                lanes=tuple(lane.statistics() for lane in self._scheduler.lanes),
                num_running=schedule.num_running,
                num_waiting=schedule.num_waiting,
                num_done=schedule.counts[PassState.DONE],
                num_failed=schedule.counts[PassState.FAILED],
                num_cancelled=schedule.counts[PassState.CANCELLED],
                paths=path_statistics(),
            )


def check_runtime(runtime: object) -> None:
    """Fail unless this is a runtime, or None for another one.

    Raises:
        TypeError: it is neither.
    """
    if runtime is not None and not isinstance(runtime, Runtime):
        raise TypeError(
            f"runtime must be an asyncdp.Runtime or None, but got {shown(runtime)}. "
            "Make one: Runtime(devices)."
        )


def scheduler_of(runtime: Runtime) -> Scheduler:
    """Return what the package's other rooms run passes by; it lives as long as the runtime."""
    return runtime._scheduler


def make_growing(drivers: Sequence[LaneDevice]) -> Runtime:
    """Return a runtime that makes lanes as they are asked for."""
    runtime = Runtime.__new__(Runtime)
    runtime._start(drivers, DEFAULT_MAX_QUEUE, grows=True)
    return runtime


def _drivers(devices: Devices | Sequence[LaneDevice]) -> list[LaneDevice]:
    entries: Sequence[Any] = devices if isinstance(devices, (list, tuple)) else [devices]
    if len(entries) > 0 and all(isinstance(entry, LaneDevice) for entry in entries):
        return list(entries)
    return [lane_device_for(device) for device in parse_devices(devices)]  # type: ignore[arg-type]


def _close_soon(scheduler: Scheduler) -> None:
    # A garbage collection may call this anywhere, also where this thread holds the very lock.
    threading.Thread(target=scheduler.close, args=(0.0,), name="asyncdp-close", daemon=True).start()
