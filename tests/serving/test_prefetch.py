"""Inputs of `DataParallel.map` are copied to CUDA lanes ahead of their turn, and not to others."""

from __future__ import annotations

import threading
from typing import Any

import anyio.to_thread
import pytest
import torch
from torch import nn

from asyncdp import DataParallel, Runtime
from asyncdp.testing.fake import FakeDevice
from tests.cuda_stub import CudaStub, cuda_stub

__all__ = ["cuda_stub"]

pytestmark = pytest.mark.anyio


class Watched(nn.Module):
    """Logs its calls, and lets a test act within the first one."""

    def __init__(self, stub: CudaStub) -> None:
        super().__init__()
        self.stub = stub
        self.may_end = threading.Event()
        self.may_end.set()

    def forward(self, x: torch.Tensor, name: str = "") -> torch.Tensor:
        self.stub.log.append(f"{self.stub.current_stream()} computes {x.tolist()}")
        assert self.may_end.wait(30)
        return x * 2


def batches(count: int) -> list[dict[str, Any]]:
    return [{"x": torch.tensor([float(n)]), "name": f"batch {n}"} for n in range(count)]


async def test_a_lane_waits_for_copies_made_on_a_stream_of_their_own(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs are pinned, copied beside the lane's stream, waited for by it, and its memory kept for it."""
    cuda_stub.watch_copies(monkeypatch)
    module = Watched(cuda_stub)
    async with Runtime([cuda_stub.lane()]) as runtime, DataParallel(module, runtime=runtime) as engine:
        results = [result.item() async for result in engine.map(batches(1))]
    assert results == [0.0]
    log = cuda_stub.log
    event = next(line for line in log if "urgent 0 records" in line).removeprefix("urgent 0 records ")
    # What else there is, is the caller's stream, the lane's wait for it, and what becomes of the result.
    assert [line for line in log if "[0.0]" in line or line.endswith(event)][:6] == [
        "pin [0.0]",
        "urgent 0 copies [0.0]",
        f"urgent 0 records {event}",
        f"stream 0 waits for {event}",
        "stream 0 borrows [0.0]",
        "stream 0 computes [0.0]",
    ]


async def test_the_next_batch_is_copied_while_one_computes(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the second batch is issued before the forward of the first has returned."""
    cuda_stub.watch_copies(monkeypatch)
    module = Watched(cuda_stub)
    module.may_end.clear()
    lane = cuda_stub.lane()
    prefetch_one = lane.prefetch

    def watched(tensors: Any) -> Any:
        take = prefetch_one(tensors)
        if any(line.endswith("copies [1.0]") for line in cuda_stub.log):
            module.may_end.set()
        return take

    monkeypatch.setattr(lane, "prefetch", watched)
    async with Runtime([lane]) as runtime, DataParallel(module, runtime=runtime) as engine:
        results = [result.item() async for result in engine.map(batches(5), max_in_flight=2)]
    assert results == [0.0, 2.0, 4.0, 6.0, 8.0]


async def test_prefetching_keeps_to_the_limit(cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is on its way to a device before it may be in flight."""
    cuda_stub.watch_copies(monkeypatch)
    module = Watched(cuda_stub)
    async with Runtime([cuda_stub.lane()]) as runtime, DataParallel(module, runtime=runtime) as engine:
        async for _ in engine.map(batches(6), max_in_flight=1):
            pass
    order = [line.split()[-2] for line in cuda_stub.log if "urgent 0 copies" in line or "computes" in line]
    assert order == ["copies", "computes"] * 6


async def test_what_cannot_be_prefetched_comes_with_the_task(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs that require gradients, sparse ones and such without tensors are moved by the lane itself."""
    cuda_stub.watch_copies(monkeypatch)
    x = torch.ones(1, requires_grad=True)
    sparse = torch.eye(2).to_sparse()
    async with Runtime([cuda_stub.lane()]) as runtime:
        async with DataParallel(Watched(cuda_stub), runtime=runtime) as engine:
            found = [result async for result in engine.map([{"x": x}])]
        async with DataParallel(nn.Identity(), runtime=runtime) as engine:
            others = [result async for result in engine.map([sparse, 3])]
    assert found[0].requires_grad
    assert others[0].is_sparse
    assert others[1] == 3
    assert not any("pin" in line for line in cuda_stub.log)


async def test_a_failing_copy_fails_its_batch_alone(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while a batch is brought comes out in that batch's place, and is held by nobody."""
    cuda_stub.watch_copies(monkeypatch)

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.item() == 1.0:
            raise MemoryError("no memory to pin")
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    module = Watched(cuda_stub)
    async with Runtime([cuda_stub.lane()]) as runtime, DataParallel(module, runtime=runtime) as engine:
        found = [result async for result in engine.map(batches(3), on_error="return")]
    assert isinstance(found[1], MemoryError)
    assert [found[0].item(), found[2].item()] == [0.0, 4.0]


async def test_other_lanes_have_no_threads_for_it() -> None:
    """A CPU lane takes its inputs as they are, and a stream over such lanes makes no thread."""
    batch = torch.ones(2)
    seen: list[torch.Tensor] = []
    threads: list[str] = []

    class Keep(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            threads.extend(each.name for each in threading.enumerate())
            return x

    async with Runtime([FakeDevice()]) as runtime, DataParallel(Keep(), runtime=runtime) as engine:
        assert [result.tolist() async for result in engine.map([batch])] == [[1.0, 1.0]]
    async with DataParallel(Keep(), "cpu*2") as engine:
        assert [result.tolist() async for result in engine.map([batch])] == [[1.0, 1.0]]
    assert seen[1] is batch
    assert not any("prefetch" in name for name in threads)


async def test_threads_end_with_the_stream(cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is left early takes its threads along."""
    cuda_stub.watch_copies(monkeypatch)
    module = Watched(cuda_stub)
    async with (
        Runtime([cuda_stub.lane()]) as runtime,
        DataParallel(module, runtime=runtime) as engine,
        engine.map(batches(50)) as results,
    ):
        await anext(results)
        threads = [each for each in threading.enumerate() if "asyncdp-prefetch" in each.name]
        assert len(threads) == 1
    await anyio.to_thread.run_sync(threads[0].join)
    assert not threads[0].is_alive()
