"""A batcher and `map` keep a device busy that copies while it computes, without waiting for a copy.

On fake devices a result is NaN until its task has completed; CUDA's stub shows the order of all streams.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from torch import Tensor, nn

from asyncdp import Batcher, DataParallel, Runtime
from asyncdp.errors import DeviceLostError
from asyncdp.testing import FakeDevice, Fault, fake_devices
from tests.cuda_stub import CudaStub, Stream, cuda_stub
from tests.runtime.helpers import PATIENCE

__all__ = ["cuda_stub"]

pytestmark = pytest.mark.anyio

ONE = torch.ones(2)


class Double(nn.Module):
    """Gives twice its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@contextmanager
def held(*devices: FakeDevice) -> Iterator[None]:
    """Hold devices, but no longer than the block, however it ends."""
    for device in devices:
        device.hold()
    try:
        yield
    finally:
        for device in devices:
            device.release()


def samples(count: int) -> list[Tensor]:
    return [torch.tensor([float(n), 1.0]) for n in range(count)]


async def outcomes_of(calls: Sequence[Any]) -> list[Any]:
    """The first number of each call's result, or its exception."""
    outcomes: list[Any] = []
    for call in calls:
        try:
            outcomes.append((await call)[0].item())
        except Exception as error:
            outcomes.append(error)
    return outcomes


async def settle() -> None:
    """Let everything happen that needs no device."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize(("copies", "num_ahead"), [(True, 2), (False, 1)])
async def test_two_batches_are_on_a_device_that_copies(copies: bool, num_ahead: int) -> None:
    """The second batch is launched before the first has ended, a third one is not; CPU lanes take one."""
    device = FakeDevice(copies=copies)
    async with (
        Runtime([device]) as runtime,
        DataParallel(Double(), runtime=runtime) as engine,
        Batcher(engine, max_batch_size=2) as batcher,
    ):
        calls = [batcher.call_nowait(sample) for sample in samples(8)]
        with held(device), anyio.fail_after(PATIENCE):
            for num_ended in range(4 - num_ahead):
                await device.wait_issued(num_ahead + num_ended)
                await settle()
                assert device.num_issued == num_ahead + num_ended
                device.release(1)
        assert await outcomes_of(calls) == [2.0 * n for n in range(8)]


async def test_nobody_has_a_result_before_its_batch_has_ended() -> None:
    """Values are there only at the end: of a batcher's call, of one on one lane, and of a stream's batch."""
    device = FakeDevice(copies=True)

    async def from_map() -> Tensor:
        return torch.cat([result async for result in engine.map([torch.ones(1)])])

    async with Runtime([device]) as runtime, DataParallel(Double(), runtime=runtime) as engine:
        for get in (lambda: engine.on_one_lane(torch.ones(1)), lambda: engine(torch.ones(1)), from_map):
            found: list[Tensor] = []

            async def keep(get: Any = get, found: list[Tensor] = found) -> None:
                found.append(await get())

            async with anyio.create_task_group() as group:
                with held(device), anyio.fail_after(PATIENCE):
                    group.start_soon(keep)
                    await device.wait_issued(device.num_issued + 1)
                    await settle()
                    assert found == []
            assert found[0].tolist() == [2.0]


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("on_cuda", [False, True])
async def test_results_arrive_in_every_mode(
    grad: Any, on_cuda: bool, cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made in inference mode may be written only there; a result with a graph is moved as it was."""
    cuda_stub.watch_copies(monkeypatch)
    fake = FakeDevice(copies=True)
    module = nn.Sequential(nn.Linear(1, 1), Busy(cuda_stub))
    async with (
        Runtime([cuda_stub.lane() if on_cuda else fake]) as runtime,
        DataParallel(module, runtime=runtime) as engine,
    ):
        with grad():
            stream = engine.map([torch.ones(1, 1)])
        results: list[Tensor] = []
        async with anyio.create_task_group() as group:

            async def read() -> None:
                results.extend([result async for result in stream])

            with held(fake):
                group.start_soon(read)
                if not on_cuda:
                    await fake.wait_issued()
        expected = module(torch.ones(1, 1))
    assert results[0].requires_grad is (grad is torch.enable_grad)
    assert results[0].is_inference() is (grad is torch.inference_mode)
    assert results[0].tolist() == expected.tolist()


@pytest.mark.parametrize("on_cuda", [False, True])
async def test_a_forward_may_write_into_what_it_gave_before(
    on_cuda: bool, cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result is what it was at the end of its batch, although the next one has written over the output."""
    cuda_stub.watch_copies(monkeypatch)
    both_ran = threading.Event()

    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = [torch.zeros(1, 2)]

        def forward(self, x: Tensor) -> Tensor:
            cuda_stub.kernel(10.0)
            output = self.output[0].copy_(x)
            if x[0, 0] == 1:
                both_ran.set()
            return output

    cuda_stub.before_waiting = lambda: both_ran.wait(PATIENCE)
    fake = FakeDevice(copies=True)
    async with (
        Runtime([cuda_stub.lane() if on_cuda else fake]) as runtime,
        DataParallel(Reuses(), runtime=runtime) as engine,
        Batcher(engine, max_batch_size=1) as batcher,
    ):
        with held(fake), anyio.fail_after(PATIENCE):
            calls = [batcher.call_nowait(sample) for sample in samples(2)]
            if not on_cuda:
                await fake.wait_issued(2)
        assert await outcomes_of(calls) == [0.0, 1.0]


async def test_a_split_of_ones_own_reads_values() -> None:
    """A `split` that reads its output runs once the values are there, and may raise."""

    def split(output: Tensor, given: Sequence[Tensor]) -> list[list[float]]:
        values = output.tolist()
        if values[0][0] == 4.0:
            raise ValueError("two is refused")
        return values

    async with (
        Runtime([FakeDevice(copies=True)]) as runtime,
        DataParallel(Double(), runtime=runtime) as engine,
        Batcher(engine, max_batch_size=1, split=split) as batcher,
    ):
        calls = [batcher.call_nowait(sample) for sample in samples(4)]
        results = [await call for call in calls[:2]]
        with pytest.raises(ValueError, match="two is refused"):
            await calls[2]
        assert [*results, await calls[3]] == [[0.0, 2.0], [2.0, 2.0], [6.0, 2.0]]


async def test_a_failing_batch_leaves_the_other_alone() -> None:
    """Of the batches on a device one raises and one has no caller left; the others get their own results."""
    device = FakeDevice(copies=True, faults={1: Fault.raising(ValueError("the second"))})
    async with (
        Runtime([device]) as runtime,
        DataParallel(Double(), runtime=runtime) as engine,
        Batcher(engine, max_batch_size=1, retry="none") as batcher,
    ):
        with held(device), anyio.fail_after(PATIENCE):
            first, second, third, fourth = [batcher.call_nowait(sample) for sample in samples(4)]
            await device.wait_issued(3)
            assert device.num_pending == 2  # of the first and the third
            third.cancel()
        one, failure, four = await outcomes_of([first, second, fourth])
    assert (one, four) == (0.0, 6.0)
    assert str(failure) == "the second"


async def test_closing_waits_for_what_is_on_the_device() -> None:
    """Leaving the batcher takes no more calls, and those on the device and in the queue are answered."""
    device = FakeDevice(copies=True)
    async with Runtime([device]) as runtime, DataParallel(Double(), runtime=runtime) as engine:
        async with anyio.create_task_group() as group, Batcher(engine, max_batch_size=1) as batcher:
            with held(device), anyio.fail_after(PATIENCE):
                calls = [batcher.call_nowait(sample) for sample in samples(3)]
                await device.wait_issued(2)
                group.start_soon(batcher.aclose)
                await settle()
                assert device.num_pending == 2
        assert await outcomes_of(calls) == [0.0, 2.0, 4.0]


async def test_a_lost_device_takes_both_its_batches() -> None:
    """Both fail with the loss, and the calls after them go to the other device."""
    lost, good = fake_devices(2, copies=True)
    async with (
        Runtime([lost, good]) as runtime,
        DataParallel(Double(), runtime=runtime) as engine,
        Batcher(engine, max_batch_size=1) as batcher,
    ):
        with held(lost, good), anyio.fail_after(PATIENCE):
            calls = [batcher.call_nowait(sample) for sample in samples(6)]
            await lost.wait_issued(2)
            await good.wait_issued(2)
            lost.lose()
        outcomes = await outcomes_of(calls)
    assert sum(isinstance(outcome, DeviceLostError) for outcome in outcomes) == 2
    assert sum(isinstance(outcome, float) for outcome in outcomes) == 4


async def test_what_waits_is_shared_out_over_lanes() -> None:
    """Each lane takes its part of what waits, and leaves nothing for a second batch on it."""
    sizes: list[int] = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return x

    devices = fake_devices(2, copies=True)
    async with (
        Runtime(devices) as runtime,
        DataParallel(Seen(), runtime=runtime) as engine,
        Batcher(engine, max_batch_size=8) as batcher,
    ):
        with held(*devices), anyio.fail_after(PATIENCE):
            calls = [batcher.call_nowait(sample) for sample in samples(6)]
            for device in devices:
                await device.wait_issued(1)
            calls += [batcher.call_nowait(sample) for sample in samples(4)]
            for device in devices:
                await device.wait_issued(2)
        await outcomes_of(calls)
    assert sizes == [3, 3, 2, 2]


async def test_an_idle_lane_comes_before_a_second_batch() -> None:
    """A batch goes to the lane that has nothing to do, although a place on the other was free last."""
    one, other = fake_devices(2, copies=True)
    async with (
        Runtime([one, other]) as runtime,
        DataParallel(Double(), runtime=runtime) as engine,
        Batcher(engine, max_batch_size=1) as batcher,
    ):
        with held(one, other), anyio.fail_after(PATIENCE):
            calls = [batcher.call_nowait(sample) for sample in samples(3)]
            await one.wait_issued(1)
            await other.wait_issued(2)
            one.release(1)
            await calls[0]
            other.release(1)
            await calls[1]
            last = batcher.call_nowait(ONE)
            await one.wait_issued(2)
            assert other.num_issued == 2
        assert await outcomes_of([calls[2], last]) == [4.0, 2.0]


# --- the order of CUDA's streams ---------------------------------------------------------------


class Busy(nn.Module):
    """Keeps its stream busy for ten seconds at each call."""

    def __init__(self, stub: CudaStub) -> None:
        super().__init__()
        self.stub = stub

    def forward(self, x: Tensor) -> Tensor:
        self.stub.log.append(f"{self.stub.current_stream()} computes {x.tolist()}")
        self.stub.kernel(10.0)
        return x * 2


async def test_a_lane_launches_and_copies_without_waiting(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next batch is copied and launched while one computes, and only the events' thread ever waits."""
    cuda_stub.watch_copies(monkeypatch)
    waits: list[str] = []
    is_second_launched = threading.Event()

    def before_waiting() -> None:
        waits.append(threading.current_thread().name)
        assert is_second_launched.wait(PATIENCE)

    class Watched(Busy):
        def forward(self, x: Tensor) -> Tensor:
            if x.tolist() == [[1.0, 1.0]]:
                is_second_launched.set()
            return super().forward(x)

    cuda_stub.before_waiting = before_waiting
    async with (
        Runtime([cuda_stub.lane()]) as runtime,
        DataParallel(Watched(cuda_stub), runtime=runtime) as engine,
        Batcher(engine, max_batch_size=1) as batcher,
    ):
        calls = [batcher.call_nowait(sample) for sample in samples(4)]
        assert await outcomes_of(calls) == [0.0, 2.0, 4.0, 6.0]
    assert set(waits) == {"asyncdp-events-cpu:0"}


async def test_copies_both_ways_have_streams_of_their_own(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In, computed, out: each waits for the one before by an event, and the end is that of the copy out."""
    cuda_stub.watch_copies(monkeypatch)
    async with (
        Runtime([cuda_stub.lane()]) as runtime,
        DataParallel(Busy(cuda_stub), runtime=runtime) as engine,
        Batcher(engine) as batcher,
    ):
        result = await batcher(torch.tensor([3.0]))
    log = cuda_stub.log
    begun = log.index("pin [[3.0]]")
    arrived = log[begun + 2].removeprefix("urgent 0 records ")
    computed = log[begun + 6].removeprefix("stream 0 records ")
    # From there on the lane's stream is ordered before the event that ends the task, too.
    assert log[begun : begun + 10] == [
        "pin [[3.0]]",
        "urgent 0 copies [[3.0]]",
        f"urgent 0 records {arrived}",
        f"stream 0 waits for {arrived}",
        "stream 0 borrows [[3.0]]",
        "stream 0 computes [[3.0]]",
        f"stream 0 records {computed}",
        f"urgent 1 waits for {computed}",
        "urgent 1 copies [[6.0]]",
        "urgent 1 borrows [[6.0]]",
    ]
    assert log[-1].startswith("urgent 1 records ")
    assert result.tolist() == [6.0]
    assert cuda_stub.now == 10.0


async def test_an_error_after_a_copy_out_is_raised_once_that_has_ended(
    cuda_stub: CudaStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch whose output cannot be split fails after all its streams, and leaves the next one nothing."""
    cuda_stub.watch_copies(monkeypatch)
    waited: list[str] = []
    monkeypatch.setattr(Stream, "synchronize", lambda stream: waited.append(str(stream)))
    lane = cuda_stub.lane()
    async with (
        Runtime([lane]) as runtime,
        DataParallel(nn.Flatten(0), runtime=runtime) as engine,
        Batcher(engine, max_batch_size=1) as batcher,
    ):
        with pytest.raises(ValueError, match="one row for each"):
            await batcher(torch.ones(2))
        assert waited == ["stream 0", "urgent 1"]
        assert lane._fetched == ()
        assert (await batcher(torch.ones(1))).tolist() == 1.0
