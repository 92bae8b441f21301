"""Lanes that hang: they are seen, others are used instead, and closing ends all the same."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import anyio
import pytest
import torch

import asyncdp
from asyncdp import LaneState
from asyncdp.errors import LaneHungError

from .helpers import Clock, Latch, wait_until

pytestmark = pytest.mark.anyio


async def outcome_of(function: Any, *args: Any, **options: Any) -> Any:
    """What an awaited call returned, or its error."""
    try:
        return await function(*args, **options)
    except Exception as error:
        return error


async def test_statistics_show_what_runs() -> None:
    """The running task has a label and a start, and its time counts as busy before it has ended."""
    latch = Latch()
    async with asyncdp.Runtime("cpu") as rt, anyio.create_task_group() as group:
        (lane,) = rt.statistics().lanes
        assert (lane.task_label, lane.task_started) == (None, None)
        begun = time.perf_counter()
        group.start_soon(rt.run, latch.hold)
        await latch.wait_entered()
        (lane,) = rt.statistics().lanes
        assert lane.task_label == "hold"
        assert lane.task_started is not None
        assert begun <= lane.task_started <= time.perf_counter()
        before = rt.statistics().lanes[0].busy_seconds
        assert 0 < before < rt.statistics().lanes[0].busy_seconds
        latch.open()
        await wait_until(lambda: rt.statistics().lanes[0].task_label is None)


async def test_a_hung_lane_is_suspect_until_it_answers(
    caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    """After `hang_timeout` other lanes are used, and the lane comes back with its answer."""
    latch = Latch()
    with caplog.at_level(logging.WARNING, logger="asyncdp"):
        async with asyncdp.Runtime("cpu*2", hang_timeout=0.05) as rt, anyio.create_task_group() as group:
            first, second = rt.lanes

            async def hang() -> None:
                await rt.run(latch.hold, lane=first)

            await rt.run(bool, lane=second)  # else it might still warm up
            group.start_soon(hang)
            await latch.wait_entered()
            clock.advance(1.0)
            await wait_until(lambda: first.state is LaneState.SUSPECT)
            assert "1 suspect" in repr(rt)
            module = torch.nn.Linear(2, 2)
            async with asyncdp.DataParallel(module, runtime=rt) as engine:
                with anyio.fail_after(30):
                    for _ in range(3):
                        assert (await engine(torch.ones(4, 2))).shape == (4, 2)
            assert second.statistics().num_done >= 3
            latch.open()
            await wait_until(lambda: first.state is LaneState.OPEN)
            assert await rt.run(lambda: 7, lane=first) == 7
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "cpu:0" in messages[0]
    assert "hold" in messages[0]
    assert "used again" in messages[1]


async def test_a_cancellation_does_not_wait_for_a_suspect_lane() -> None:
    """A cancelled pass ends once its lane is known to hang, and what the task returns later is dropped."""
    latch = Latch()
    async with asyncdp.Runtime("cpu", hang_timeout=0.05) as rt:
        with anyio.fail_after(30):
            with anyio.move_on_after(0.01) as scope:
                await rt.run(latch.hold)
            assert scope.cancelled_caught
            assert rt.lanes[0].state is LaneState.SUSPECT
            latch.open()
            assert await rt.run(lambda: 7) == 7
        assert rt.lanes[0].state is LaneState.OPEN


@pytest.mark.parametrize("owner", ["runtime", "engine"])
async def test_close_ends_by_its_timeout(owner: str, caplog: pytest.LogCaptureFixture) -> None:
    """What runs and what is queued at the timeout fails with the reason, and the log says so."""
    latch = Latch()
    outcomes: list[Any] = []

    class Hangs(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            latch.hold()
            return x

    engine = asyncdp.DataParallel(Hangs(), "cpu")
    rt = engine.runtime if owner == "engine" else asyncdp.Runtime("cpu")

    async def call() -> None:
        if owner == "engine":
            outcomes.append(await outcome_of(engine, torch.ones(2)))
        else:
            outcomes.append(await outcome_of(rt.run, latch.hold))

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        group.start_soon(call)
        await latch.wait_entered()
        await wait_until(lambda: rt.statistics().lanes[0].num_queued == 2)
        with anyio.fail_after(30):
            await (engine if owner == "engine" else rt).aclose(timeout=0.05)
    latch.open()
    assert [type(outcome) for outcome in outcomes] == [LaneHungError] * 2
    assert "abandoned" in caplog.text
    if owner == "runtime":
        await engine.aclose()


@pytest.mark.parametrize("seconds", [30, math.inf])
async def test_close_within_its_timeout_abandons_nothing(
    seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A timeout that is not needed changes nothing, however long it is."""
    rt = asyncdp.Runtime("cpu", hang_timeout=seconds)
    assert await rt.run(lambda: 7) == 7
    await rt.aclose(timeout=seconds)
    assert not caplog.records


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_hang_timeout_is_checked(seconds: float) -> None:
    """A time that is none is refused."""
    with pytest.raises(ValueError, match="hang_timeout"):
        asyncdp.Runtime("cpu", hang_timeout=seconds)


@pytest.mark.parametrize("work", ["runtime, hang_timeout=0.2", "batcher, hang_timeout=0.2", "batcher"])
def test_the_first_interrupt_ends_a_program_with_a_hung_lane(work: str) -> None:
    """Ctrl-C once is enough, although a lane never answers."""
    program = textwrap.dedent(
        f"""
        import asyncio, time, torch
        from asyncdp import Batcher, Runtime

        def hang(*args):
            print("hangs", flush=True)
            time.sleep(1000)

        async def tick():
            # Else asyncio may sleep on a signal that comes right before it goes to sleep.
            while True:
                await asyncio.sleep(0.1)

        async def main():
            ticking = asyncio.create_task(tick())
            async with Runtime("cpu", hang_timeout={0.2 if "hang_timeout" in work else None}) as rt:
                if {work!r}.startswith("runtime"):
                    await rt.run(hang)
                else:
                    async with Batcher(hang, runtime=rt) as batcher:
                        await batcher(torch.ones(2))

        asyncio.run(main())
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert "abandoned" in errors
