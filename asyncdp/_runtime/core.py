"""What lanes and passes share: the lock, the schedule, the lanes, and what became of everything."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .._devices import LaneDevice
from .._loops.completion import Callback, new_completion
from ..errors import AsyncDPError, DeviceLostError, QueueFullError, RuntimeClosedError
from .lane import Lane
from .passes import Pass, PassState
from .schedule import Action, Admit, LaneState, Refuse, Schedule


class Core:
    """What lanes and passes share with the runtime, but for the handle a user holds.

    `lock` guards the schedule, the queues of the lanes and the progress of passes.

    Args:
        max_queue: works that may be queued on one lane.
        num_threads: intra-op threads for all CPU lanes together.
    """

    def __init__(self, max_queue: int, num_threads: int) -> None:
        self.num_threads = num_threads
        self.lane_threads = num_threads
        self.lock = threading.Lock()
        self.schedule = Schedule(0, max_queue)
        self.lanes: list[Lane] = []
        self.device_types: tuple[str, ...] = ("cpu",)
        self.captures = False
        self.num_cpu_lanes = 0
        self.closed_cause = "the runtime is closed"
        self.num_running = 0
        self.counts: Counter[PassState] = Counter()
        self.lost: dict[int, str] = {}  # lanes, and what their devices were lost by
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
        self.lane_threads = self.thread_share(self.num_cpu_lanes)
        if driver.device.type not in self.device_types:
            self.device_types += (driver.device.type,)
        lane.start()
        return lane

    def thread_share(self, num_lanes: int) -> int:
        """Intra-op threads for each of `num_lanes` CPU lanes that run at the same time."""
        return max(1, self.num_threads // (num_lanes or 1))

    # The following are called with the lock held.

    def submit(self, one: Pass, waits: bool) -> None:
        """Give a pass to the schedule; refuse it if there is no room and it does not wait."""
        self.num_running += 1
        action = self.schedule.submit(one, one.lanes)
        if type(action) is Admit:
            one.enqueue()
        elif action is not None:
            self.act([action])
        elif not waits:
            self.schedule.withdraw(one)
            names = " or ".join(self.lanes[lane].name for lane in sorted(set(one.lanes)))
            one.refuse(QueueFullError(f"lane {names}", self.schedule.max_queue))

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
        return None if lane is None else self._lost_error(lane)

    def lose(self, lane: Lane, cause: BaseException | None) -> None:
        """Close every lane of a lost device and fail what is queued on them."""
        for other in self.lanes:
            if other.device != lane.device or self.schedule.state(other.index) is LaneState.LOST:
                continue
            self.lost[other.index] = str(cause).partition("\n")[0]
            self.act(self.schedule.lose(other.index))
            for work in other.clear():
                work.owner.drop(work, self._lost_error(other.index))

    def close(self) -> None:
        """Take nothing more; lanes stop once the last pass has ended."""
        if not self.schedule.closed:
            self.act(self.schedule.close())
            self._stop_if_idle()

    def _lost_error(self, lane: int) -> DeviceLostError:
        # Made anew for each pass: one that is kept would keep every traceback it was raised with.
        return DeviceLostError(self.lanes[lane].name, self.lost[lane])

    def _refusal(self, action: Refuse) -> AsyncDPError:
        if action.lane is not None and action.lane in self.lost:
            return self._lost_error(action.lane)
        return RuntimeClosedError(self.closed_cause)

    def _stop_if_idle(self) -> None:
        if self.schedule.closed and self.num_running == 0 and not self._stopped:
            self._stopped = True
            for lane in self.lanes:
                lane.stop()

    def finished(self, one: Pass, completion: Callback) -> None:
        """Count a pass that has ended; its loop is told after the lock is released."""
        self.counts[one.state] += 1
        self.num_running -= 1
        self.to_wake.append(completion.finish)
        if self.schedule.closed:
            self._stop_if_idle()

    # Called without the lock.

    def capture(self, lanes: Iterable[Lane]) -> dict[torch.device, Any]:
        """Note, on the submitting thread, what works on the devices of `lanes` have to wait for.

        A device may prove to be lost only here, while no lane works on it.
        """
        captured: dict[torch.device, Any] = {}
        for lane in lanes:
            if lane.device in captured or lane.state is not LaneState.OPEN:
                continue
            try:
                captured[lane.device] = lane.driver.capture()
            except Exception as error:
                if not lane.driver.lost(error):
                    raise
                with self.lock:
                    self.lose(lane, error)
                self.wake()
        return captured

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
        ended = new_completion(lambda: None)  # the wait goes on to its end

        def join_then_finish() -> None:
            self.shut_down(None)
            ended.finish()

        # Joining blocks, and the loop must not.
        thread = threading.Thread(target=join_then_finish, name="asyncdp-close", daemon=True)
        thread.start()
        await ended


def _lane_name(device: torch.device, ordinal: int) -> str:
    if device.index is None:
        return f"{device.type}:{ordinal}"
    return str(device) if ordinal == 0 else f"{device}/{ordinal}"
