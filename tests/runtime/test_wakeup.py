"""How a lane waits for its next work: awake for a moment, if the moment is likely to be enough."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from functools import partial
from types import SimpleNamespace

import anyio
import pytest

import asyncdp
from asyncdp._loops import completion
from asyncdp._runtime import wakeup as wakeup_module
from asyncdp._runtime.wakeup import LOOK_SECONDS, Look, Wakeup
from asyncdp.testing.fake import fake_devices

from .helpers import PATIENCE, Latch, runtime, wait_until

ENDLESS = 300_000_000
"""Elements per row that take a tenth of a second or so; a look at all rows takes seconds."""


@pytest.fixture
def spare_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of several cores, whatever this one has."""
    monkeypatch.setattr(wakeup_module, "has_spare_core", lambda: True)


def expectant() -> Wakeup:
    """A wakeup whose last wait was short."""
    wakeup = Wakeup()
    wakeup.signal()
    wakeup.wait(look=False)
    return wakeup


@pytest.mark.usefixtures("spare_core")
def test_a_signal_ends_the_look_from_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look leaves the interpreter to the thread that signals, sees the signal and ends by it."""
    monkeypatch.setattr(wakeup_module, "_row_length", lambda: ENDLESS)
    wakeup = expectant()
    waiter = threading.Thread(target=wakeup.wait, kwargs={"look": True})
    waiter.start()
    while not wakeup.is_looking:
        assert waiter.is_alive()
    wakeup.signal()
    waiter.join(PATIENCE)
    assert not waiter.is_alive()
    assert not wakeup.is_looking
    assert wakeup.look.seen[-2]


@pytest.mark.usefixtures("spare_core")
def test_a_wait_without_a_signal_outlasts_the_look() -> None:
    """A look that sees nothing is followed by sleep until the signal comes."""
    wakeup = expectant()
    woken = threading.Event()

    def wait() -> None:
        wakeup.wait(look=True)
        woken.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not woken.wait(20 * LOOK_SECONDS)
    wakeup.signal()
    assert woken.wait(PATIENCE)
    waiter.join(PATIENCE)


@pytest.mark.usefixtures("spare_core")
def test_each_signal_ends_one_wait() -> None:
    """Nothing of a signal is left for the look after it."""
    wakeup = expectant()
    for _ in range(2):
        wakeup.signal()
        wakeup.wait(look=True)
        assert wakeup.look.seen[-2]
        assert not wakeup.look.seen[-1]
        wakeup.look.take()
        assert not wakeup.look.seen.any()


def test_a_look_may_be_shorter() -> None:
    """A look of less time goes through as many rows less, and ends a row after the sign just the same."""
    look = Look(100e-6)
    look.give()
    look.take(35e-6)
    assert look.seen.tolist() == [False] * 6 + [True] * 3 + [False]
    look.take(1.0)
    assert look.seen.tolist() == [True] * 9 + [False]


@pytest.mark.usefixtures("spare_core")
def test_a_look_is_twice_as_long_as_the_last_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was waited for only briefly is not looked for much longer."""
    asked: list[float] = []
    monkeypatch.setattr(Look, "take", lambda self, seconds: asked.append(seconds))
    clock = iter([0.0, 0.125e-3, 1.0, 1.0])
    monkeypatch.setattr(wakeup_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    wakeup = Wakeup()
    for _ in range(2):
        wakeup.signal()
        wakeup.wait(look=True)
    assert asked == [0.25e-3]


def test_nobody_looks_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unasked, without a spare core, or after a long wait, the thread sleeps at once."""
    cores = SimpleNamespace(spare=True)
    monkeypatch.setattr(wakeup_module, "has_spare_core", lambda: cores.spare)
    wakeup = expectant()

    def looked(*, asked: bool = True) -> bool:
        wakeup.look.seen[:] = False
        wakeup.signal()
        wakeup.wait(look=asked)
        return bool(wakeup.look.seen.any())

    assert looked()
    assert not looked(asked=False)
    cores.spare = False
    assert not looked()
    cores.spare = True
    assert looked()
    clock = iter([0.0, 0.0, 0.0, 1.0, 2.0, 2.0])  # of the look, too
    monkeypatch.setattr(wakeup_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert looked()  # and this wait took a second
    assert not looked()


def test_looks_that_end_late_are_left_out_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others want the cores, looks may take a fiftieth of the time too long; a stop counts 10 ms."""
    clock = SimpleNamespace(now=0.0, late=0.0)

    def passes(*arguments: object, **named: object) -> None:
        clock.now += 1e-3 + clock.late

    fake_numpy = SimpleNamespace(logical_or=SimpleNamespace(reduce=passes))
    look = Look(1e-3)
    monkeypatch.setattr(wakeup_module, "np", fake_numpy)
    monkeypatch.setattr(wakeup_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def rest(late: float, num_looks: int) -> float:
        """How long after looks that end so late the next is left out."""
        clock.late, clock.now = late, clock.now + 1e4
        for _ in range(num_looks):
            assert look.is_worth_it(clock.now)
            look.take()
        return next(ms / 1e3 for ms in itertools.count() if look.is_worth_it(clock.now + ms / 1e3 + 0.5e-3))

    assert rest(0.9e-3, 100) == 0.0
    assert rest(2e-3, 5) == 0.0
    assert rest(4e-3, 3) == pytest.approx(0.1 - 2 * 5e-3, abs=1e-3)
    assert rest(60.0, 1) == 0.0
    # The second of two stops begins before the rest for the first is over.
    assert rest(0.01, 2) == pytest.approx(0.5 - 0.011, abs=1e-3)


@pytest.mark.usefixtures("spare_core")
def test_neither_lane_nor_loop_looks_while_it_is_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sleep then, and are woken."""
    looked: list[Look] = []
    wakeup = expectant()

    async def wait_on_loop() -> None:
        awaited = completion.new_completion(lambda: None)
        awaited.expect()
        asyncio.get_running_loop().call_later(0.0, awaited.finish)
        await awaited

    def wait_everywhere() -> int:
        """How many looked."""
        looked.clear()
        wakeup.signal()
        wakeup.wait(look=True)
        asyncio.run(wait_on_loop())
        return len(looked)

    monkeypatch.setattr(Look, "take", lambda self, seconds=math.inf: looked.append(self))
    assert wait_everywhere() == 2
    monkeypatch.setattr(Look, "is_worth_it", lambda self, now: False)
    assert wait_everywhere() == 0


@pytest.mark.anyio
async def test_a_lane_looks_for_more_after_a_short_work_with_nothing_else_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither a long work nor another, of any runtime, leaves a lane awake: it would take their core."""
    clock = SimpleNamespace(now=0.0)
    lane_clock = SimpleNamespace(perf_counter=lambda: clock.now)
    looks: list[tuple[str, bool]] = []
    plain_wait = Wakeup.wait

    def wait(self: Wakeup, *, look: bool) -> None:
        looks.append((threading.current_thread().name, look))
        plain_wait(self, look=look)

    def pass_time(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(Wakeup, "wait", wait)
    monkeypatch.setattr("asyncdp._runtime.lane.time", lane_clock)
    async with runtime() as rt, runtime(1) as other:
        await wait_until(lambda: len(looks) == 3)
        first, second = rt.lanes

        async def look_after(seconds: float) -> tuple[str, bool]:
            before = len(looks)
            await rt.run(pass_time, seconds, lane=first)
            await wait_until(lambda: len(looks) > before)
            return looks[-1]

        assert await look_after(LOOK_SECONDS / 2) == ("asyncdp-cpu:0", True)
        assert await look_after(LOOK_SECONDS * 2) == ("asyncdp-cpu:0", False)
        for busy, lane in ((rt, second), (other, other.lanes[0])):
            latch, before = Latch(), len(looks)
            async with anyio.create_task_group() as group:
                group.start_soon(partial(busy.run, latch.hold, lane=lane))
                await latch.wait_entered()
                assert await look_after(LOOK_SECONDS / 2) == ("asyncdp-cpu:0", False)
                latch.open()
            await wait_until(lambda: len(looks) == before + 2)  # noqa: B023  called at once
        assert await look_after(LOOK_SECONDS / 2) == ("asyncdp-cpu:0", True)


@pytest.mark.anyio
async def test_a_lane_is_alert_while_it_looks_between_short_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asleep, or after a work too long for a look of the event loop, nobody shall wait for a lane awake."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("asyncdp._runtime.lane.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def pass_time(seconds: float) -> None:
        clock.now += seconds

    async with runtime(1) as rt:
        (lane,) = rt.lanes
        for share, is_alert in ((0.4, True), (0.6, False)):
            await rt.run(pass_time, share * completion.LOOK_SECONDS)
            await wait_until(lambda: lane._sleeping)
            monkeypatch.setattr(lane._wakeup, "is_looking", True)
            assert lane.is_alert == is_alert
            monkeypatch.setattr(lane._wakeup, "is_looking", False)
            assert not lane.is_alert


@pytest.mark.anyio
async def test_a_work_that_the_device_goes_on_with_took_nobody_knows_how_long() -> None:
    """What it took to issue is not taken for what it takes: nothing is expected of such a lane soon."""
    async with asyncdp.Runtime(fake_devices(1)) as rt, runtime(1) as cpu:
        for each, is_known in ((cpu, True), (rt, False)):
            assert each.lanes[0].last_seconds == math.inf
            await each.run(int)
            assert (each.lanes[0].last_seconds < math.inf) == is_known
