"""What the runtime does over CUDA lanes, shown on a stub in place of CUDA."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

import anyio
import pytest
import torch
from torch import nn

from asyncdp import DataParallel, LaneState, Runtime
from asyncdp._devices import cuda
from asyncdp._kernels import transfer
from asyncdp._runtime.task import driver_of
from asyncdp.errors import DeviceLostError, GatherError
from tests.cuda_stub import CudaStub, Event, cuda_stub

from .helpers import Latch, run_stages, wait_until

__all__ = ["cuda_stub"]

pytestmark = pytest.mark.anyio

WORDS = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(autouse=True)
def no_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub's devices do not read each other's memory."""
    monkeypatch.setattr(transfer, "_enable_peer_access", lambda one, other: False)


async def test_every_stage_is_ordered_behind_the_caller(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lanes wait for the caller's stream, also if another lane prepares; the result is lent to it.

    The first pass that records gradients has a stage of its own on the first lane.
    """
    cuda_stub.watch_copies(monkeypatch)
    home = cuda.CudaLane(torch.device("cpu"))  # whose tensors torch says to be on its very device
    async with Runtime([cuda_stub.lane(1), home]) as runtime:
        async with DataParallel(nn.Linear(1, 1), output_device="cpu", runtime=runtime) as engine:
            await run_stages(runtime, [(lane, int) for lane in runtime.lanes])  # both are open
            cuda_stub.log.clear()
            output = await engine(torch.tensor([[1.0], [2.0]]))
        streams = [str(driver_of(lane)._stream) for lane in runtime.lanes]  # type: ignore[attr-defined]
    log = cuda_stub.log
    noted = {line.removeprefix("default records ") for line in log if line.startswith("default records")}
    assert len(noted) == 2, "once for each device"
    waits = [line.split(" waits for ") for line in log if " waits for " in line]
    assert {stream for stream, event in waits if event in noted} == set(streams)
    assert f"default borrows {output.tolist()}" in log


async def test_every_work_has_the_stream_of_its_lane(cuda_stub: CudaStub) -> None:
    """A work that makes another stream the current one, and leaves it so, does not change the next one's."""
    async with Runtime([cuda_stub.lane()]) as runtime:
        before = await runtime.run(cuda_stub.current_stream)
        await runtime.run(cuda_stub.set_stream, cuda_stub.make_stream())
        assert await runtime.run(cuda_stub.current_stream) is before


async def test_a_device_lost_between_passes_is_told(cuda_stub: CudaStub) -> None:
    """A device found lost at the call fails that pass and all later ones alike, and closes its lanes."""
    async with Runtime([cuda_stub.lane()]) as runtime:
        await runtime.run(int)
        cuda_stub.lost = True
        for _ in range(2):
            with pytest.raises(DeviceLostError, match="illegal memory access"):
                await runtime.run(int)
        assert runtime.statistics().lanes[0].state is LaneState.LOST
        assert runtime.statistics().num_failed == 2


async def test_after_a_loss_callers_get_no_raw_errors(cuda_stub: CudaStub) -> None:
    """The pass that a device is lost under has the very error, each later one a `DeviceLostError`."""

    def lose() -> None:
        cuda_stub.lost = True
        raise RuntimeError(WORDS)

    async with Runtime([cuda_stub.lane()]) as runtime:
        with pytest.raises(RuntimeError, match=f"^{WORDS}"):
            await runtime.run(lose)
        for _ in range(2):
            with pytest.raises(DeviceLostError, match="illegal memory access"):
                await runtime.run(lose)
        assert runtime.statistics().num_failed == 3


async def test_an_error_of_capturing_that_is_no_loss_is_raised(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the caller's stream cannot be noted for another reason, the caller gets that; the lane goes on."""

    def record(self: Any, stream: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    async with Runtime([cuda_stub.lane()]) as runtime:
        await runtime.run(int)
        with monkeypatch.context() as patch:
            patch.setattr("tests.cuda_stub.Event.record", record)
            with pytest.raises(RuntimeError, match="not permitted"):
                await runtime.run(int)
        assert await runtime.run(int) == 0


async def test_a_loss_under_a_gather_is_a_loss(cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context error while outputs are put together is not taken for outputs that do not fit."""

    def lose(*_: Any) -> torch.Tensor:
        cuda_stub.lost = True
        raise RuntimeError(WORDS)

    monkeypatch.setattr(torch, "cat", lose)
    async with Runtime([cuda_stub.lane()]) as runtime:
        from asyncdp import gather

        with pytest.raises(RuntimeError, match=f"^{WORDS}") as caught:
            await runtime.run(gather, [torch.ones(2), torch.ones(2)], "cpu")
        assert not isinstance(caught.value, GatherError)
        assert runtime.statistics().lanes[0].state is LaneState.LOST


async def test_a_long_work_hides_no_short_one_and_nobody_polls(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lane's ends are waited for by themselves, blocking: no event is asked for again and again."""
    long = Latch()
    asked_by: list[str] = []
    query, synchronize = Event.query, Event.synchronize

    def ask(self: Event) -> bool:
        asked_by.append(threading.current_thread().name)
        return query(self)

    def wait(self: Event) -> None:
        if self.reached_at >= 100:
            long.hold()
        synchronize(self)

    monkeypatch.setattr(Event, "query", ask)
    monkeypatch.setattr(Event, "synchronize", wait)
    async with Runtime([cuda_stub.lane(), cuda_stub.lane()]) as runtime, anyio.create_task_group() as group:
        first, second = runtime.lanes
        group.start_soon(lambda: runtime.run(cuda_stub.kernel, 100.0, lane=first))
        await long.wait_entered()
        for _ in range(3):
            await runtime.run(cuda_stub.kernel, 1.0, lane=second)
        long.open()
    assert set(asked_by) == {"asyncdp-cpu:0", "asyncdp-cpu:0/1"}


async def test_waiters_end_with_their_lanes(cuda_stub: CudaStub) -> None:
    """Closing a runtime leaves no thread that waits for events."""
    before = event_threads()
    async with Runtime([cuda_stub.lane(), cuda_stub.lane()]) as runtime:
        await run_stages(runtime, [(lane, partial(cuda_stub.kernel, 1.0)) for lane in runtime.lanes])
        assert event_threads() == before + 2
    assert event_threads() == before


async def test_a_waiter_keeps_nothing_of_what_has_ended(cuda_stub: CudaStub) -> None:
    """While it waits for the next event, the last work's tensors are free to go."""
    async with Runtime([cuda_stub.lane()]) as runtime:
        tensor = torch.ones(3)
        alive = weakref.ref(tensor)

        def run(given: torch.Tensor) -> None:
            cuda_stub.kernel(1.0)

        await runtime.run(run, tensor)
        del tensor
        await wait_until(lambda: alive() is None)
        assert alive() is None


def event_threads() -> int:
    return sum(thread.name.startswith("asyncdp-events") for thread in threading.enumerate())


async def test_a_lane_that_never_opened_can_be_closed(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane whose device cannot be bound ends with its runtime, and is told of as lost."""

    def refuse(device: torch.device) -> None:
        raise RuntimeError("no context for you")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    async with Runtime([cuda_stub.lane()]) as runtime:
        with pytest.raises(DeviceLostError, match="no context for you"):
            await runtime.run(int)
