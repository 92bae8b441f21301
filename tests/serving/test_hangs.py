"""A batcher over lanes that hang goes round them, and its end does not wait for them."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest
import torch

from asyncdp import Batcher, LaneState, Runtime
from asyncdp.errors import BatcherClosedError, LaneHungError

from ..runtime.helpers import Clock, wait_until

pytestmark = pytest.mark.anyio

HANGS = torch.tensor(-1.0)
ONE = torch.tensor(1.0)


class Model:
    """Hangs on negative samples until it is told to go on."""

    def __init__(self) -> None:
        self.hangs = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            self.hangs.set()
            assert self.go_on.wait(60)
        return x * 2

    async def wait_hangs(self) -> None:
        await anyio.to_thread.run_sync(self.hangs.wait)


async def outcome_of(call: Any) -> Any:
    try:
        return (await call).item()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("max_in_flight", [None, 1])
async def test_a_batcher_goes_round_a_hung_lane(max_in_flight: int | None, clock: Clock) -> None:
    """Other calls are answered on another lane, a spare one too; the hung call is when its lane answers."""
    model = Model()
    async with (
        Runtime("cpu*2") as runtime,
        Batcher(model, hang_timeout=0.05, max_in_flight=max_in_flight, runtime=runtime) as batcher,
    ):
        hung = batcher.call_nowait(HANGS)
        await model.wait_hangs()
        clock.advance(1.0)
        with anyio.fail_after(30):
            for _ in range(5):
                assert (await batcher(ONE)).item() == 2.0
            await wait_until(lambda: batcher.statistics().num_suspect == 1)
            assert batcher.statistics().num_suspect == 1
            assert [lane.state for lane in runtime.lanes].count(LaneState.SUSPECT) == 1
            model.go_on.set()
            assert (await hung).item() == -2.0
            assert (await batcher(ONE)).item() == 2.0
        assert batcher.statistics().num_suspect == 0
        assert all(lane.state is LaneState.OPEN for lane in runtime.lanes)


async def test_a_lane_that_others_hang_is_not_used(clock: Clock) -> None:
    """A free place whose lane hangs by somebody else's task gets no batch."""
    model = Model()
    async with (
        Runtime("cpu*2", hang_timeout=0.05) as runtime,
        Batcher(model, runtime=runtime) as batcher,
        anyio.create_task_group() as group,
    ):
        for lane in runtime.lanes:
            model.hangs.clear()

            async def hang(lane: Any = lane) -> None:
                await runtime.run(model, HANGS, lane=lane)

            group.start_soon(hang)
            await model.wait_hangs()
            clock.advance(1.0)
            with anyio.fail_after(30):
                await wait_until(lambda lane=lane: lane.state is LaneState.SUSPECT)
                if lane is runtime.lanes[0]:
                    calls = [batcher.call_nowait(ONE) for _ in range(4)]
                    assert [(await call).item() for call in calls] == [2.0] * 4
        waiting = batcher.call_nowait(ONE)
        await anyio.sleep(0.1)
        assert batcher.statistics().num_queued == 1
        model.go_on.set()
        with anyio.fail_after(30):
            assert (await waiting).item() == 2.0


@pytest.mark.parametrize("is_async", [False, True])
async def test_close_ends_by_its_timeout(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    """At the timeout running calls get the reason, waiting ones that it is closed, and the log says so."""
    model = Model()

    async def engine(x: torch.Tensor) -> torch.Tensor:
        model.hangs.set()
        await anyio.sleep_forever()
        return x

    async with Runtime("cpu") as runtime:
        batcher = await Batcher(engine if is_async else model, max_batch_size=1, runtime=runtime).__aenter__()
        calls = [batcher.call_nowait(HANGS), batcher.call_nowait(ONE)]
        await model.wait_hangs()
        with anyio.fail_after(30):
            await batcher.aclose(timeout=0.05)
            await batcher.aclose()
        assert "closed" in repr(batcher)
        assert [await outcome_of(call) for call in calls] == [LaneHungError, BatcherClosedError]
        model.go_on.set()
    assert "abandoned" in caplog.text
    assert batcher.statistics().num_running == 0


async def test_leaving_does_not_wait_for_a_suspect_lane() -> None:
    """Where the lane is known to hang, the end of the block abandons its batch."""
    model = Model()
    async with Runtime("cpu*2", hang_timeout=0.05) as runtime:
        with anyio.fail_after(30):
            async with Batcher(model, max_batch_size=1, runtime=runtime) as batcher:
                calls = [batcher.call_nowait(HANGS), *(batcher.call_nowait(ONE) for _ in range(3))]
                await model.wait_hangs()
        assert [await outcome_of(call) for call in calls] == [LaneHungError, 2.0, 2.0, 2.0]
        model.go_on.set()


def test_hang_timeout_is_checked() -> None:
    """A time that is none is refused."""
    with pytest.raises(ValueError, match="hang_timeout"):
        Batcher(Model(), hang_timeout=0)
