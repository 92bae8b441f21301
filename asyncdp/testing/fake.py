"""Fake devices: CPU tensors, while completions, time and faults are under the test's control."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import _loops
from .._checks import as_seconds
from .._devices.base import LaneDevice
from .._loops import Completion
from .clock import VirtualClock
from .faults import Fault, FaultKind


class FakeDeviceLost(RuntimeError):
    """The error of every task on a lost fake device."""


class _Fetched(NamedTuple):
    """A result on its way to the host."""

    result: torch.Tensor
    host: torch.Tensor


@dataclass(eq=False)
class _Pending:
    """A task that was issued and has not completed."""

    ends_at: float
    hangs: bool
    loses: bool
    fetched: Sequence[_Fetched] = ()
    callback: Callable[[BaseException | None], None] | None = None


class _Chip:
    """What the lanes of one fake device share."""

    def __init__(self) -> None:
        self.lanes: list[FakeDevice] = []
        self.lost = False


class FakeDevice(LaneDevice):
    """One lane of a fake device: tasks run at once on CPU tensors, and complete when the test lets them.

    Tasks of one lane complete in the order they were issued, as on a CUDA stream.

    Args:
        index: the device is called `cpu:<index>`; give each fake device its own.
        clock: virtual time, needed for `seconds` and delays.
        seconds: virtual time that each task takes.
        faults: what goes wrong, by the number of the task on this lane, from 0.
        held: whether to start as after `hold()`.
        copies: whether whole batches are copied in and their results out as on a CUDA device: results of
            floats are NaN, others 0, until their task completes.

    Raises:
        ValueError: `seconds` or a delay without a clock; `seconds` is negative, or no number.
    """

    def __init__(
        self,
        index: int = 0,
        *,
        clock: VirtualClock | None = None,
        seconds: float = 0.0,
        faults: Mapping[int, Fault] | None = None,
        held: bool = False,
        copies: bool = False,
    ) -> None:
        super().__init__(torch.device("cpu", index))
        self.prefetches = copies
        self._faults = dict(faults or {})
        seconds = as_seconds("seconds", seconds)
        if clock is None and (seconds or any(fault.seconds for fault in self._faults.values())):
            raise ValueError("a task that takes time needs a clock. Pass clock=VirtualClock().")
        self._given_clock = clock
        self._clock = clock or VirtualClock()
        self._seconds = seconds
        self._held = held
        self._chip = _Chip()
        self._chip.lanes.append(self)
        self._pending: deque[_Pending] = deque()
        self._fetched: list[_Fetched] = []  # by the task that runs
        self._free_at = 0.0
        self._num_started = 0
        self._num_issued = 0
        self._watchers: list[tuple[int, Completion]] = []
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        state = "lost" if self._chip.lost else "held" if self._held else "open"
        return f"<FakeDevice {self.device}: {state}, {self._num_issued} issued, {self.num_pending} pending>"

    def sibling(self, *, faults: Mapping[int, Fault] | None = None) -> FakeDevice:
        """Make another lane on the same device; when the device is lost, both are.

        Raises:
            ValueError: a delay, but the device has no clock.
        """
        other = FakeDevice(
            self.device.index,
            clock=self._given_clock,
            seconds=self._seconds,
            faults=faults,
            held=self._held,
            copies=self.prefetches,
        )
        other._chip = self._chip
        self._chip.lanes.append(other)
        return other

    @property
    def num_issued(self) -> int:
        """Number of tasks issued so far, failed ones included."""
        return self._num_issued

    @property
    def num_pending(self) -> int:
        """Number of tasks issued and not complete."""
        return len(self._pending)

    def hold(self) -> None:
        """Complete tasks only by `release` from now on."""
        self._held = True

    def release(self, count: int | None = None) -> None:
        """Complete the oldest `count` pending tasks; if None, all of them, and hold no longer.

        Tasks that hang are released too; tasks that take virtual time still take it.
        """
        with self._lock:
            self._held = self._held and count is not None
            for pending in list(self._pending)[:count]:
                pending.hangs = False
                if count is not None and pending.ends_at <= self._clock.now:
                    self._pending.remove(pending)
                    self._complete(pending)
            self._complete_ready()

    def lose(self) -> None:
        """Lose the device: pending tasks of all its lanes fail, and so does every later one."""
        self._chip.lost = True
        for lane in self._chip.lanes:
            with lane._lock:
                lane._complete_ready()

    async def wait_issued(self, count: int = 1) -> None:
        """Wait until at least `count` tasks have been issued since the lane was made."""

        def forget() -> None:
            with self._lock:
                if watcher in self._watchers:  # otherwise it is finished already
                    self._watchers.remove(watcher)
                    completion.finish()

        completion = _loops.current().completion(forget)
        watcher = (count, completion)
        with self._lock:
            self._watchers.append(watcher)
            self._finish_watchers()
        await completion

    def prefetch(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Copy tensors at once."""
        copies = [tensor.clone() for tensor in tensors]
        return lambda: copies

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors that get their values when the task completes."""
        hosts = [torch.full_like(tensor, _poison(tensor.dtype)) for tensor in tensors]
        self._fetched += [_Fetched(tensor.clone(), host) for tensor, host in zip(tensors, hosts, strict=True)]
        return hosts

    def issue(self, captured: Any, function: Callable[[], Any]) -> tuple[Any, Any]:
        """Run `function` and return a marker of its end, or do what the task's fault says."""
        with self._lock:
            fault = self._faults.get(self._num_started)
            self._num_started += 1
        try:
            if self._chip.lost:
                raise self._lost_error()
            if fault is not None and fault.error is not None:
                raise fault.error
            value = function()
        except BaseException:
            self._fetched = []
            self._count_issued()
            raise
        kind = None if fault is None else fault.kind
        self._free_at = max(self._free_at, self._clock.now) + self._seconds
        self._free_at += 0.0 if fault is None else fault.seconds
        fetched, self._fetched = self._fetched, []
        return value, _Pending(self._free_at, kind is FaultKind.HANG, kind is FaultKind.LOSE, fetched)

    def on_complete(self, marker: _Pending, callback: Callable[[BaseException | None], None]) -> None:
        """Call `callback` when the test or the clock completes the task."""
        marker.callback = callback
        with self._lock:
            self._pending.append(marker)
        if marker.loses:
            self.lose()
        elif marker.ends_at > self._clock.now:
            self._clock.call_at(marker.ends_at, self._on_time)
        self._on_time()
        self._count_issued()

    def lost(self, error: BaseException) -> bool:
        """Return whether the error is that of a lost fake device."""
        return isinstance(error, FakeDeviceLost)

    def _on_time(self) -> None:
        with self._lock:
            self._complete_ready()

    def _complete_ready(self) -> None:
        """Complete pending tasks up to the first that has to wait; the caller holds the lane's lock."""
        while self._pending and self._is_ready(self._pending[0]):
            self._complete(self._pending.popleft())

    def _is_ready(self, pending: _Pending) -> bool:
        if self._chip.lost:
            return True
        return not (self._held or pending.hangs or pending.ends_at > self._clock.now)

    def _complete(self, pending: _Pending) -> None:
        # The callback refers to the task's tensors, which must not outlive the completion.
        callback, pending.callback = pending.callback, None
        assert callback is not None
        with torch.inference_mode():  # what was made there may be written only there
            for each in () if self._chip.lost else pending.fetched:
                each.host.copy_(each.result)
        pending.fetched = ()
        callback(self._lost_error() if self._chip.lost else None)

    def _lost_error(self) -> FakeDeviceLost:
        return FakeDeviceLost(f"fake device {self.device} was lost")

    def _count_issued(self) -> None:
        with self._lock:
            self._num_issued += 1
            self._finish_watchers()

    def _finish_watchers(self) -> None:
        reached = [each for each in self._watchers if each[0] <= self._num_issued]
        self._watchers = [each for each in self._watchers if each[0] > self._num_issued]
        for _, completion in reached:
            completion.finish()


def _poison(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point or dtype.is_complex else 0


def fake_devices(
    count: int,
    *,
    lanes_per_device: int = 1,
    clock: VirtualClock | None = None,
    seconds: float = 0.0,
    faults: Mapping[tuple[int, int], Fault] | None = None,
    copies: bool = False,
) -> list[FakeDevice]:
    """Make the lanes of `count` fake devices, for `Runtime(fake_devices(4))`.

    Args:
        count: number of devices.
        lanes_per_device: number of lanes on each; lanes are numbered device by device.
        clock: virtual time of all devices.
        seconds: virtual time that each task takes.
        faults: what goes wrong, by lane `k` and number `n` of the task on that lane: `{(k, n): fault}`.
        copies: see `FakeDevice`.

    Returns:
        one entry per lane.

    Raises:
        ValueError: a fault names a lane that does not exist or a negative task number; `seconds` or a delay
            without a clock.
    """
    own: list[dict[int, Fault]] = [{} for _ in range(count * lanes_per_device)]
    for (lane, number), fault in (faults or {}).items():
        if not 0 <= lane < len(own) or number < 0:
            raise ValueError(
                f"there is no task {number} of lane {lane} for a fault. "
                f"Name one of the lanes 0 to {len(own) - 1} and a task number from 0."
            )
        own[lane][number] = fault
    lanes: list[FakeDevice] = []
    for index in range(count):
        start = index * lanes_per_device
        first = FakeDevice(index, clock=clock, seconds=seconds, faults=own[start], copies=copies)
        siblings = [first.sibling(faults=own[start + later]) for later in range(1, lanes_per_device)]
        lanes += [first, *siblings]
    return lanes
