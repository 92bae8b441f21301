"""Fake devices: what they promise, and what the runtime does over completions that come late."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import anyio
import pytest
import torch
from torch import nn

from asyncdp import DataParallel, LaneState, Runtime
from asyncdp.errors import DeviceLostError
from asyncdp.testing import FakeDevice, FakeDeviceLost, Fault, VirtualClock, fake_devices
from tests.runtime.helpers import run_stages

pytestmark = pytest.mark.anyio


async def test_completions_decide_the_order() -> None:
    """A pass ends when its device completes it, not when its call has returned."""
    devices = fake_devices(2)
    ended: list[str] = []

    async def run(name: str, lane: int) -> None:
        await runtime.run(lambda: name, lane=runtime.lanes[lane])
        ended.append(name)

    async with Runtime(devices) as runtime, anyio.create_task_group() as group:
        for device in devices:
            device.hold()
        group.start_soon(run, "first", 0)
        group.start_soon(run, "second", 1)
        for device in devices:
            await device.wait_issued()
        assert ended == []
        devices[1].release()
        await anyio.wait_all_tasks_blocked()
        while not ended:
            await anyio.lowlevel.checkpoint()
        assert ended == ["second"]
        devices[0].release()
    assert ended == ["second", "first"]


async def test_one_lane_completes_in_issue_order() -> None:
    """`release(1)` completes the oldest task of a lane and leaves the next pending."""
    device = FakeDevice(held=True)
    ended: list[int] = []

    async def run(number: int) -> None:
        ended.append(await runtime.run(lambda: number))

    async with Runtime([device]) as runtime, anyio.create_task_group() as group:
        group.start_soon(run, 0)
        await device.wait_issued(1)
        group.start_soon(run, 1)
        await device.wait_issued(2)
        device.release(1)
        assert device.num_pending == 1
        while not ended:
            await anyio.lowlevel.checkpoint()
        assert ended == [0]
        device.release()
    assert ended == [0, 1]


async def test_inputs_live_until_completion() -> None:
    """A call's tensors stay referenced until the device is done, and no longer."""
    device = FakeDevice(held=True)
    tensor = torch.ones(3)
    alive = weakref.ref(tensor)
    async with Runtime([device]) as runtime, anyio.create_task_group() as group:
        group.start_soon(runtime.run, torch.sum, tensor)
        del tensor
        await device.wait_issued()
        gc.collect()
        assert alive() is not None
        device.release()
    gc.collect()
    assert alive() is None


async def test_cancellation_drains_what_runs_on_the_device() -> None:
    """A cancelled pass waits for its device, discards queued tasks, then raises the cancellation."""
    device = FakeDevice(held=True)
    ended: list[str] = []

    async def run() -> None:
        try:
            await runtime.run(lambda: None)
        finally:
            ended.append("cancelled" if device.num_pending == 0 else "too early")

    async with Runtime([device]) as runtime:
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await device.wait_issued()
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
                assert ended == []
                device.release()
        assert ended == ["cancelled"]
        assert await runtime.run(lambda: 7) == 7
        assert runtime.statistics().num_cancelled == 1


async def test_lost_device_closes_its_lanes_only() -> None:
    """A loss fails pending and queued passes of all lanes of the device; the others go on."""
    lost, sibling, other = [*fake_devices(1, lanes_per_device=2), FakeDevice(1)]
    errors: list[BaseException] = []

    async def run(lane: int) -> None:
        try:
            await runtime.run(lambda: None, lane=runtime.lanes[lane])
        except (DeviceLostError, FakeDeviceLost) as error:
            errors.append(error)

    async with Runtime([lost, sibling, other]) as runtime:
        async with anyio.create_task_group() as group:
            lost.hold()
            sibling.hold()
            group.start_soon(run, 0)
            group.start_soon(run, 1)
            await lost.wait_issued()
            await sibling.wait_issued()
            lost.lose()
        assert [type(error) for error in errors] == [FakeDeviceLost, FakeDeviceLost]
        states = [lane.state for lane in runtime.statistics().lanes]
        assert states == [LaneState.LOST, LaneState.LOST, LaneState.OPEN]
        with pytest.raises(DeviceLostError, match="cpu:0"):
            await runtime.run(lambda: None, lane=runtime.lanes[1])
        assert await runtime.run(lambda: 5) == 5


async def test_queued_passes_of_a_lost_device_fail() -> None:
    """Tasks queued behind the one during which a device is lost fail with `DeviceLostError`."""
    device = FakeDevice(faults={0: Fault.lose()})
    first_runs, goes_on = anyio.Event(), anyio.Event()
    errors: list[BaseException] = []

    async def run(function: object) -> None:
        try:
            await runtime.run(function)  # type: ignore[arg-type]
        except Exception as error:
            errors.append(error)

    def block() -> None:
        anyio.from_thread.run_sync(first_runs.set, token=token)
        anyio.from_thread.run(goes_on.wait, token=token)

    token = anyio.lowlevel.current_token()
    async with Runtime([device]) as runtime, anyio.create_task_group() as group:
        group.start_soon(run, block)
        await first_runs.wait()
        group.start_soon(run, lambda: None)
        await anyio.wait_all_tasks_blocked()
        goes_on.set()
    assert {type(error) for error in errors} == {FakeDeviceLost, DeviceLostError}


async def test_fault_raises_at_lane_and_call() -> None:
    """A fault hits the lane and call it names and no other; the lane works on."""
    error = ValueError("poison")
    async with Runtime(fake_devices(2, faults={(1, 1): Fault.raising(error)})) as runtime:
        second = runtime.lanes[1]
        assert await runtime.run(lambda: 1, lane=second) == 1
        with pytest.raises(ValueError, match="poison") as caught:
            await runtime.run(lambda: 2, lane=second)
        assert caught.value is error
        assert await runtime.run(lambda: 3, lane=second) == 3


async def test_virtual_time_completes_tasks() -> None:
    """Tasks of one lane take their seconds one after another, a delay comes on top."""
    clock = VirtualClock()
    device = FakeDevice(clock=clock, seconds=2.0, faults={1: Fault.delay(3.0)})
    ended: list[int] = []

    async def run(number: int) -> None:
        ended.append(await runtime.run(lambda: number))

    async with Runtime([device]) as runtime, anyio.create_task_group() as group:
        group.start_soon(run, 0)
        await device.wait_issued(1)
        group.start_soon(run, 1)
        await device.wait_issued(2)
        clock.advance(1.9)
        assert device.num_pending == 2
        assert clock.advance_to_next() == 2.0
        assert device.num_pending == 1
        clock.advance(4.9)
        assert device.num_pending == 1
        assert clock.advance_to_next() == 7.0
    assert sorted(ended) == [0, 1]


async def test_hang_ends_with_release() -> None:
    """A hanging task completes only when the test releases it."""
    device = FakeDevice(faults={0: Fault.hang()})
    async with Runtime([device]) as runtime, anyio.create_task_group() as group:
        group.start_soon(runtime.run, lambda: None)
        await device.wait_issued()
        assert device.num_pending == 1
        device.release()
    assert device.num_pending == 0


async def test_engine_over_fake_devices_learns_as_one_module() -> None:
    """An engine over fake devices copies parameters, and sums gradients, as over real ones."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    module(x).sum().backward()
    wanted = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    async with Runtime(fake_devices(2)) as runtime, DataParallel(module, runtime=runtime) as engine:
        output = await engine(x)
        assert torch.allclose(output, module(x))
        await runtime.run(output.sum().backward)
    for parameter, grad in zip(module.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, grad)


def test_time_needs_a_clock() -> None:
    """A duration without a clock is refused, since nothing could ever end it."""
    with pytest.raises(ValueError, match="clock"):
        FakeDevice(seconds=1.0)
    with pytest.raises(ValueError, match="seconds is in seconds"):
        VirtualClock().advance(-1.0)


async def test_waiting_for_issue_can_be_cancelled() -> None:
    """`wait_issued` can be cancelled by a timeout."""
    with anyio.move_on_after(0.01) as scope:
        await FakeDevice().wait_issued()
    assert scope.cancelled_caught


async def test_a_cancelled_wait_for_issue_is_forgotten() -> None:
    """Tasks issued after a wait for them was cancelled do not end that wait a second time."""
    device = FakeDevice()
    async with Runtime([device]) as runtime:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await device.wait_issued()
        assert await runtime.run(int) == 0
        await anyio.lowlevel.checkpoint()
        await device.wait_issued(1)
        assert device.num_issued == 1


async def test_a_wait_for_issue_that_is_cancelled_as_it_ends_ends_once() -> None:
    """A cancellation after the awaited task was issued, but before the waiting task runs, does no harm."""
    device = FakeDevice()
    cancelled: list[bool] = []

    async def wait(scope: anyio.CancelScope) -> None:
        with scope:
            await device.wait_issued()
        cancelled.append(scope.cancelled_caught)

    async with Runtime([device]) as runtime, anyio.create_task_group() as group:
        scope = anyio.CancelScope()
        group.start_soon(wait, scope)
        await anyio.wait_all_tasks_blocked()
        device._count_issued()  # from this thread, so that the waiting task has no turn in between
        scope.cancel()
        with anyio.fail_after(20):
            while not cancelled:
                await anyio.lowlevel.checkpoint()
        assert await runtime.run(int) == 0


async def test_inputs_of_a_cancelled_call_live_until_it_has_drained() -> None:
    """A cancelled call's tensors stay referenced as long as the device may read them, and no longer."""
    device = FakeDevice(held=True)
    alive: list[weakref.ref[torch.Tensor]] = []

    async def run() -> None:
        tensor = torch.ones(3)
        alive.append(weakref.ref(tensor))
        call = runtime.run(torch.sum, tensor)
        del tensor
        await call

    async with Runtime([device]) as runtime:
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await device.wait_issued()
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
                gc.collect()
                was_alive = alive[0]() is not None
                device.release()
        gc.collect()
        assert was_alive
        assert alive[0]() is None


@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_one_stage_hands_to_the_next_lives_until_that_has_drained(cancelled: bool) -> None:
    """What only a task itself refers to is not freed while the device may read it, cancelled or not."""
    device = FakeDevice(faults={1: Fault.hang()})
    alive: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        tensor = torch.ones(3)
        alive.append(weakref.ref(tensor))
        return tensor

    async with Runtime([device]) as runtime:
        lane = runtime.lanes[0]
        async with anyio.create_task_group() as group:
            group.start_soon(
                run_stages,
                runtime,
                [(lane, make)],
                lambda made, last: [(last, partial(torch.sum, made[0]))],
            )
            await device.wait_issued(2)
            if cancelled:
                group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
                gc.collect()
                was_alive = alive[0]() is not None
                device.release()
        gc.collect()
        assert was_alive
        assert alive[0]() is None


async def test_a_lost_device_closes_idle_lanes_at_once() -> None:
    """A lane that shares the lost device takes nothing more, though no task of its own has failed."""
    lost, sibling = fake_devices(1, lanes_per_device=2, faults={(0, 0): Fault.lose()})
    async with Runtime([lost, sibling]) as runtime:
        with pytest.raises(FakeDeviceLost):
            await runtime.run(int, lane=runtime.lanes[0])
        assert [lane.state for lane in runtime.lanes] == [LaneState.LOST] * 2
        with pytest.raises(DeviceLostError):
            await runtime.run(int, lane=runtime.lanes[1])
        assert sibling.num_issued == 0


async def test_many_devices_and_passes_end_once() -> None:
    """Two hundred passes over delayed lanes on virtual time all end, each with its own value."""
    clock = VirtualClock()
    results: dict[int, int] = {}

    async def run(number: int) -> None:
        results[number] = await runtime.run(partial(int, number))

    devices = fake_devices(3, clock=clock, seconds=1.0)
    async with Runtime(devices) as runtime, anyio.create_task_group() as group:
        for number in range(200):
            group.start_soon(run, number)
        while len(results) < 200:
            clock.advance_to_next()
            await anyio.lowlevel.checkpoint()
    assert results == {number: number for number in range(200)}
