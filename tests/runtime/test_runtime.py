"""The runtime: calls on lanes, failures, back-pressure, what it shows of itself."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from functools import partial

import anyio
import pytest
import torch

import asyncdp
from asyncdp.errors import (
    DeviceLostError,
    NestedPassError,
    RuntimeClosedError,
    StopIterationInLaneError,
    UnknownDeviceError,
)

from .helpers import PATIENCE, LaneDevice, Latch, lane_threads, run_stages, runtime, wait_until

pytestmark = pytest.mark.anyio


async def test_a_call_runs_on_a_lane_and_returns_its_value() -> None:
    """`run` calls the function on a lane's thread, not on the loop's."""
    async with runtime() as rt:
        name = await rt.run(lambda: threading.current_thread().name)
        assert name == "asyncdp-cpu:0"
        assert await rt.run(divmod, 7, 2) == (3, 1)


async def test_the_loop_goes_on_while_a_lane_works() -> None:
    """Other tasks run while a lane is busy."""
    latch = Latch()
    async with runtime(1) as rt, anyio.create_task_group() as group:
        group.start_soon(rt.run, latch.hold)
        await latch.wait_entered()
        assert rt.statistics().num_running == 1, "the lane is held while this task goes on"
        latch.open()


async def test_the_very_exception_comes_out_with_a_note() -> None:
    """The awaiting task gets the object that was raised, told where, with the lane's traceback."""
    error = KeyError("gone")

    def fail() -> None:
        raise error

    async with runtime() as rt:
        with pytest.raises(KeyError) as caught:
            await rt.run(fail, lane=rt.lanes[1])
        assert caught.value is error
        assert error.__notes__ == ["on lane cpu:1"]
        assert "fail" in [entry.name for entry in caught.traceback]
        with pytest.raises(KeyError):
            await rt.run(fail, lane=rt.lanes[1])
        assert len(error.__notes__) == 1, "an object raised twice must not collect notes"
        assert await rt.run(int, "3") == 3, "the lane goes on"


async def test_the_first_failure_in_time_wins() -> None:
    """Not the lowest lane but the earliest failure is raised; the others are in its notes."""
    second_failed = threading.Event()

    def late() -> None:
        assert second_failed.wait(20)
        raise ValueError("late")

    def early() -> None:
        try:
            raise OSError("early")
        finally:
            second_failed.set()

    async with runtime() as rt:
        with pytest.raises((OSError, ValueError)) as caught:
            await run_stages(rt, [(rt.lanes[0], late), (rt.lanes[1], early)], replica_stage=0)
        first, *others = caught.value.__notes__
    assert "in replica" in first
    assert len(others) == 1
    assert "also failed: replica" in others[0]


async def test_only_replicas_are_called_so() -> None:
    """Failures before and after the replicas' stage are told by their lane alone."""

    def fail(what: str) -> None:
        raise ValueError(what)

    async with runtime() as rt:
        for failing, note in enumerate(["on lane cpu:0", "in replica 0 on lane cpu:0", "on lane cpu:0"]):
            stages = [
                [(rt.lanes[0], partial(fail, "x") if number == failing else int)] for number in range(3)
            ]
            first, *following = stages
            with pytest.raises(ValueError, match="x") as caught:
                await run_stages(
                    rt, first, *(lambda *_, stage=stage: stage for stage in following), replica_stage=1
                )
            assert caught.value.__notes__ == [note]


async def test_stop_iteration_is_wrapped() -> None:
    """A bare StopIteration would hang the await; it comes out as the cause of an error of ours."""
    async with runtime() as rt:
        with pytest.raises(StopIterationInLaneError) as caught:
            await rt.run(next, iter(()))
        assert isinstance(caught.value.__cause__, StopIteration)


async def test_base_exceptions_are_carried() -> None:
    """Also what is no Exception reaches the awaiting task, and the lane survives it."""

    class Abandon(BaseException):
        pass

    def abandon() -> None:
        raise Abandon

    async with runtime() as rt:
        with pytest.raises(Abandon):
            await rt.run(abandon)
        assert await rt.run(int) == 0


async def test_stages_follow_each_other() -> None:
    """A following stage gets the results of the one before, in order of its works."""
    async with runtime() as rt:
        stage = [(lane, lambda index=index: index) for index, lane in enumerate(rt.lanes)]
        results = await run_stages(
            rt, stage, lambda values, last: [(last, lambda: [value * 10 for value in values])]
        )
        assert results == [[0, 10]]


async def test_a_failed_stage_ends_the_pass() -> None:
    """No further stage begins once a work has failed."""
    begun: list[str] = []
    async with runtime() as rt:
        stage = [(rt.lanes[0], lambda: 1 / 0), (rt.lanes[1], int)]
        with pytest.raises(ZeroDivisionError):
            await run_stages(rt, stage, lambda *_: begun.append("second") or [])
    assert begun == []


async def test_a_failing_transition_is_reported() -> None:
    """An error while the next stage is made reaches the caller like any other."""
    async with runtime() as rt:
        with pytest.raises(ZeroDivisionError):
            await run_stages(rt, [(rt.lanes[0], int)], lambda *_: 1 / 0)  # type: ignore[arg-type]
        assert await rt.run(int) == 0


async def test_a_full_queue_makes_callers_wait() -> None:
    """With no queue at all, the second call waits for the first and then runs."""
    latch = Latch()
    order: list[str] = []

    async def call(rt: asyncdp.Runtime, name: str) -> None:
        await rt.run(order.append, name)

    async with runtime(1, max_queue=0) as rt, anyio.create_task_group() as group:
        group.start_soon(rt.run, latch.hold)
        await latch.wait_entered()
        group.start_soon(call, rt, "waited")
        await wait_until(lambda: rt.statistics().num_waiting == 1)
        assert order == []
        latch.open()
    assert order == ["waited"]


async def test_a_pass_larger_than_a_queue_runs() -> None:
    """A stage with more works for a lane than ever find room there runs once the lane is idle."""
    latch = Latch()
    order: list[int] = []

    async def pass_of(count: int) -> None:
        await run_stages(rt, [(rt.lanes[0], partial(order.append, count))] * count)

    async with runtime(1, max_queue=0) as rt, anyio.create_task_group() as group:
        group.start_soon(rt.run, latch.hold)
        await latch.wait_entered()
        group.start_soon(pass_of, 3)
        await wait_until(lambda: rt.statistics().num_waiting == 1)
        group.start_soon(pass_of, 1)
        await wait_until(lambda: rt.statistics().num_waiting == 2)
        latch.open()
    assert order == [3, 3, 3, 1]


async def test_a_stage_of_no_works_ends_at_once() -> None:
    """A pass goes over an empty stage to the next, and ends after the last."""
    async with runtime(1) as rt:
        lane = rt.lanes[0]
        with anyio.fail_after(PATIENCE):
            assert await run_stages(rt, []) == []
            assert await run_stages(rt, [(lane, int)], lambda *_: []) == []
            empty_twice = [lambda *_: [], lambda results, last: [(last, lambda: (results, last))]]
            assert await run_stages(rt, [], *empty_twice) == [([], lane)]
        assert rt.statistics().num_done == 3


async def test_statistics_and_repr_tell_the_state() -> None:
    """Counts of passes and lanes are exact once everything has ended."""
    async with runtime() as rt:
        await rt.run(int)
        with pytest.raises(ZeroDivisionError):
            await rt.run(lambda: 1 / 0)
        seen = rt.statistics()
        assert (seen.num_done, seen.num_failed, seen.num_cancelled) == (1, 1, 0)
        assert (seen.num_running, seen.num_waiting) == (0, 0)
        assert [lane.name for lane in seen.lanes] == ["cpu:0", "cpu:1"]
        assert all(lane.state is asyncdp.LaneState.OPEN and lane.num_queued == 0 for lane in seen.lanes)
        assert repr(rt) == "<Runtime [cpu:0, cpu:1]: 2 open; 0 passes running, 0 waiting>"
    assert "2 closed" in repr(rt)


async def test_closing_drains_and_ends_the_threads() -> None:
    """Leaving the block waits for what runs, refuses what comes, and leaves no thread."""
    before = lane_threads()
    latch = Latch()
    results: list[int] = []

    async def call(rt: asyncdp.Runtime) -> None:
        def work() -> int:
            latch.hold()
            return 7

        results.append(await rt.run(work))

    async with anyio.create_task_group() as group:
        async with runtime(1) as rt:
            group.start_soon(call, rt)
            await latch.wait_entered()
            latch.open()
        assert lane_threads() <= before
    assert results == [7]
    with pytest.raises(RuntimeClosedError, match="the runtime is closed"):
        await rt.run(int)


async def test_closing_refuses_who_waits_for_room() -> None:
    """A call that waits for room when the runtime closes fails with the reason."""
    latch = Latch()
    outcome: list[BaseException] = []

    async def wait_for_room(rt: asyncdp.Runtime) -> None:
        try:
            await rt.run(int)
        except RuntimeClosedError as error:
            outcome.append(error)

    rt = runtime(1, max_queue=0)
    async with anyio.create_task_group() as group:
        group.start_soon(rt.run, latch.hold)
        await latch.wait_entered()
        group.start_soon(wait_for_room, rt)
        await wait_until(lambda: rt.statistics().num_waiting == 1)
        group.start_soon(rt.aclose)
        await wait_until(lambda: outcome)
        latch.open()
    assert len(outcome) == 1


async def test_a_lane_cannot_wait_for_itself() -> None:
    """Submitting to the runtime one runs on is refused instead of hanging."""
    async with runtime() as rt:

        def nested() -> None:
            anyio.run(rt.run, int)

        with pytest.raises(NestedPassError, match="lane cpu:0"):
            await rt.run(nested)


async def test_lanes_share_the_cores() -> None:
    """Lanes times threads are the cores torch uses, and the caller's count is left alone."""
    before = torch.get_num_threads()
    async with runtime(2) as rt:
        inside = await rt.run(torch.get_num_threads)
        assert inside == max(1, before // 2)
        for num_threads in (before, before + 1):
            assert await rt.run(torch.get_num_threads, num_threads=num_threads) == num_threads
    assert torch.get_num_threads() == before
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [before], "threads made later must not inherit a lane's count"


async def test_an_engine_names_the_lanes_that_are_missing() -> None:
    """An engine over a runtime with too few lanes on a device says which one, before anything runs."""
    async with runtime(1) as rt:
        with pytest.raises(UnknownDeviceError, match="cpu"):
            asyncdp.DataParallel(torch.nn.Identity(), "cpu*2", runtime=rt)


async def test_warm_up_visits_each_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are made ready on a lane's thread, once per device and not per lane."""
    seen: list[tuple[torch.device, str]] = []
    monkeypatch.setattr(
        LaneDevice,
        "warm_up",
        lambda driver: seen.append((driver.device, threading.current_thread().name)),
    )
    async with runtime(2) as rt:
        await rt.warm_up()
    assert seen == [(torch.device("cpu"), "asyncdp-cpu:1")]


def test_max_queue_is_checked() -> None:
    """A negative bound is refused before a thread starts."""
    before = lane_threads()
    with pytest.raises(ValueError, match="max_queue must be 0 or more"):
        asyncdp.Runtime("cpu", max_queue=-1)
    assert lane_threads() <= before


async def test_an_idle_lane_keeps_nothing_alive() -> None:
    """After a pass, neither its arguments nor its result stay referenced by the lane."""
    async with runtime(1) as rt:
        tensor = torch.ones(3)
        alive = weakref.ref(tensor)
        result = await rt.run(torch.clone, tensor)
        out = weakref.ref(result)
        await rt.run(int)
        del tensor, result
        assert alive() is None
        assert out() is None


async def test_a_failed_call_leaves_no_cycle() -> None:
    """Once the exception is dropped, the tensors of the failed call are free without a collection."""

    def fail(tensor: torch.Tensor) -> None:
        raise ValueError(tensor.shape)

    async with runtime(1) as rt:
        gc.collect()
        gc.disable()
        try:
            tensor = torch.ones(3)
            alive = weakref.ref(tensor)
            with contextlib.suppress(ValueError):
                await rt.run(fail, tensor)
            await rt.run(int)
            del tensor
            assert alive() is None
        finally:
            gc.enable()


async def test_a_device_that_cannot_be_opened_refuses_its_passes() -> None:
    """If a lane's thread cannot bind to its device, calls fail with the reason and never hang."""

    class Broken(LaneDevice):
        def open(self) -> None:
            raise RuntimeError("no context for you")

    async with asyncdp.Runtime([Broken(torch.device("cpu", 7))]) as rt:
        with pytest.raises(DeviceLostError, match="no context for you"):
            await rt.run(int)
        with pytest.raises(DeviceLostError, match="no context for you"):
            await rt.run(int)
        assert rt.statistics().lanes[0].state is asyncdp.LaneState.LOST


async def test_lanes_may_spin_before_they_sleep() -> None:
    """Passes on lanes that spin give the same, one after the other and many at once, and they end."""
    before = lane_threads()
    async with asyncdp.Runtime("cpu*2", spin=1e-3) as runtime:
        alone = [await runtime.run(abs, -number) for number in range(50)]
        together: list[int] = []

        async def run(number: int) -> None:
            together.append(await runtime.run(abs, -number))

        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(run, number)
    assert alone == sorted(together) == list(range(50))
    assert lane_threads() <= before


@pytest.mark.parametrize("spin", [-1e-3, 1.0, True, "1", float("nan")])
def test_a_spin_out_of_range_is_refused(spin: object) -> None:
    """The error names the argument, its unit and its range, and no lane is started."""
    with pytest.raises(ValueError, match=r"spin is in seconds, from 0 to 0\.1"):
        asyncdp.Runtime("cpu", spin=spin)  # type: ignore[arg-type]
