"""A cancelled task: what is queued is dropped, what runs drains, then the cancellation goes on."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import anyio
import pytest
import torch

import asyncdp

from .helpers import PATIENCE, Latch, run_stages, runtime, wait_until

pytestmark = pytest.mark.anyio


async def test_running_work_drains_before_the_cancellation_goes_on() -> None:
    """The cancelled task does not go on while its lane still works."""
    latch = Latch()
    events: list[str] = []

    def work() -> None:
        latch.hold()
        events.append("drained")

    async with runtime(1) as rt:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def cancel_then_open() -> None:
                    await latch.wait_entered()
                    scope.cancel()
                    latch.open()

                group.start_soon(cancel_then_open)
                try:
                    await rt.run(work)
                finally:
                    events.append("went on")
        assert scope.cancelled_caught
        assert events == ["drained", "went on"]
        assert rt.statistics().num_cancelled == 1
        assert await rt.run(int) == 0, "no lane is left broken"


async def test_queued_work_is_dropped() -> None:
    """A call cancelled before its turn never runs, and ends at once."""
    latch = Latch()
    ran: list[int] = []
    async with runtime(1) as rt, anyio.create_task_group() as group:
        group.start_soon(rt.run, latch.hold)
        await latch.wait_entered()
        with anyio.CancelScope() as scope:

            async def cancel_when_queued() -> None:
                await wait_until(lambda: rt.statistics().lanes[0].num_queued == 2)
                scope.cancel()

            group.start_soon(cancel_when_queued)
            await rt.run(ran.append, 1)
        assert scope.cancelled_caught
        assert rt.statistics().lanes[0].num_queued == 1, "the dropped work holds no place"
        latch.open()
    assert ran == []


async def test_waiting_for_room_can_be_cancelled() -> None:
    """A call cancelled while it waits for room leaves the line."""
    latch = Latch()
    async with runtime(1, max_queue=0) as rt, anyio.create_task_group() as group:
        group.start_soon(rt.run, latch.hold)
        await latch.wait_entered()
        with anyio.CancelScope() as scope:

            async def cancel_when_waiting() -> None:
                await wait_until(lambda: rt.statistics().num_waiting == 1)
                scope.cancel()

            group.start_soon(cancel_when_waiting)
            await rt.run(int)
        assert scope.cancelled_caught
        assert rt.statistics().num_waiting == 0
        latch.open()


async def test_half_queued_half_running() -> None:
    """Of a pass over two lanes, the queued half is dropped and the running half drained."""
    busy, mine = Latch(), Latch()
    ran: list[str] = []

    def second() -> None:
        mine.hold()
        ran.append("running half")

    async with runtime(2) as rt, anyio.create_task_group() as group:

        async def occupy() -> None:
            await rt.run(busy.hold, lane=rt.lanes[0])

        group.start_soon(occupy)
        await busy.wait_entered()
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                await mine.wait_entered()
                scope.cancel()
                mine.open()

            group.start_soon(cancel)
            await run_stages(rt, [(rt.lanes[0], lambda: ran.append("queued half")), (rt.lanes[1], second)])
        assert scope.cancelled_caught
        assert ran == ["running half"]
        busy.open()


async def test_no_further_stage_after_a_cancellation() -> None:
    """A pass cancelled in its first stage begins no second."""
    latch = Latch()
    begun: list[str] = []
    async with runtime(1) as rt, anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                await latch.wait_entered()
                scope.cancel()
                latch.open()

            group.start_soon(cancel)
            await run_stages(rt, [(rt.lanes[0], latch.hold)], lambda *_: begun.append("next") or [])
        assert scope.cancelled_caught
    assert begun == []


async def test_a_timeout_is_a_cancellation() -> None:
    """A deadline raises TimeoutError after the running work has drained."""
    latch = Latch()
    async with runtime(1) as rt:
        timer = threading.Timer(0.05, latch.open)
        timer.start()
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.01):
                await rt.run(latch.hold)
        assert await rt.run(int) == 0
        timer.join(PATIENCE)


async def test_a_call_that_fails_while_it_drains_leaves_no_cycle() -> None:
    """The caller sees a cancellation, which is what is counted; its tensors are free at once."""
    latch = Latch()
    given: list[weakref.ref[torch.Tensor]] = []

    def fail(tensor: torch.Tensor) -> None:
        given.append(weakref.ref(tensor))
        latch.hold()
        raise ValueError(tensor.shape)

    async with runtime(1) as rt, anyio.create_task_group() as group:
        gc.collect()
        gc.disable()
        try:
            with anyio.CancelScope() as scope:

                async def cancel() -> None:
                    await latch.wait_entered()
                    scope.cancel()
                    latch.open()

                group.start_soon(cancel)
                await rt.run(fail, torch.ones(3))
            assert scope.cancelled_caught
            await rt.run(int)
            assert given[0]() is None
        finally:
            gc.enable()
        assert (rt.statistics().num_failed, rt.statistics().num_cancelled) == (0, 1)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_repeated_cancels_on_asyncio_end_once() -> None:
    """Cancelling a task again while it drains changes nothing; it ends cancelled, with the message."""
    latch = Latch()
    async with runtime(1) as rt:
        task = asyncio.create_task(rt.run(latch.hold))
        await latch.wait_entered()
        task.cancel("enough")
        await asyncio.sleep(0)
        task.cancel("again")
        latch.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert rt.statistics().num_cancelled == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_wait_for_keeps_its_promise() -> None:
    """asyncio.wait_for raises TimeoutError once the lane has drained."""
    latch = Latch()
    async with asyncdp.Runtime("cpu") as rt:
        timer = threading.Timer(0.05, latch.open)
        timer.start()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(rt.run(latch.hold), 0.01)
        timer.join(PATIENCE)
        assert rt.statistics().num_running == 0
