"""What the caller of a pass learns when replicas fail, and what the failure leaves behind."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor, nn

import asyncdp
from asyncdp.errors import GatherError, NestedPassError, StopIterationInLaneError
from tests.runtime.helpers import Latch, wait_until

from .conftest import Passes
from .models import Failing, Fn, numbered


class Odd(Exception):
    """An exception that cannot be made anew from its arguments."""

    def __init__(self, one: int, *, other: int) -> None:
        super().__init__(f"{one} and {other}")


def test_first_failure_in_time_wins(dp: Passes) -> None:
    """Contract 9: not the lowest lane's but the earliest exception, the very object, notes and all."""
    errors = {0: ValueError("late"), 2: Odd(1, other=2), 4: KeyError("last")}
    module = Failing(errors, order=[2, 0, 4])
    with pytest.raises(Odd) as caught:
        dp(module, numbered(8), lanes=4)
    assert caught.value is errors[2]
    assert module.finished == [6]
    assert caught.value.__notes__ == [
        "in replica 1 on lane cpu:1",
        "also failed: replica 0 on lane cpu:0: ValueError('late')",
        "also failed: replica 2 on lane cpu:2: KeyError('last')",
    ]
    frames = []
    traceback = caught.value.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_qualname)
        traceback = traceback.tb_next
    assert frames[-1] == "Failing.forward"


def test_all_lanes_have_drained_when_the_failure_is_told(dp: Passes) -> None:
    """Contract 9: the caller hears of the failure only after every other replica has ended."""
    ended = threading.Event()
    failed = threading.Event()

    def forward(_m: Any, x: Tensor) -> Tensor:
        if x[0, 0] == 0:
            try:
                raise ValueError("first")
            finally:
                failed.set()
        assert failed.wait(20)
        ended.set()
        return x

    with pytest.raises(ValueError, match="first"):
        dp(Fn(forward), numbered(4))
    assert ended.is_set()


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
)
def test_exceptions_that_are_no_errors_are_carried(error: BaseException) -> None:
    """Contract 9: what is not an Exception reaches the caller too, as the very object."""

    async def catch() -> BaseException | None:
        try:
            await asyncdp.data_parallel(Failing({2: error}, order=[2]), numbered(4), "cpu*2")
        except BaseException as caught:
            return caught
        return None

    assert asyncio.run(catch()) is error
    assert "in replica 1 on lane cpu:1" in error.__notes__


def test_stop_iteration_is_wrapped(dp: Passes) -> None:
    """Contract 9: StopIteration, which would hang a future, arrives as the cause of an error."""
    stop = StopIteration(7)
    with pytest.raises(StopIterationInLaneError) as caught:
        dp(Failing({0: stop}, order=[0]), numbered(4))
    assert caught.value.__cause__ is stop
    assert isinstance(caught.value, RuntimeError)


def test_failed_lanes_run_the_next_pass(dp: Passes) -> None:
    """Contract 21: after failures on every lane the next pass of the same module is right."""
    errors: dict[int, BaseException] = {0: ValueError("a"), 2: SystemExit(1)}
    module = Failing(errors, order=[0, 2])
    for _ in range(3):
        for turn in module.turns.values():
            turn.clear()
        with pytest.raises(ValueError, match="a"):
            dp(module, numbered(4))
        assert torch.equal(dp(module, numbered(4) + 10), numbered(4) + 10)


def test_failure_of_the_gather_is_told(dp: Passes) -> None:
    """Outputs that do not fit together are the pass's error; the lanes go on."""
    module = Fn(lambda m, x: x[:, : 1 + int(x[0, 0])])
    with pytest.raises(GatherError, match=r"sizes \[2, 1\], \[2, 3\] do not fit"):
        dp(module, numbered(4).expand(4, 3))
    assert dp(module, torch.zeros(4, 3)).shape == (4, 1)


def test_pass_inside_a_forward_is_refused(dp: Passes) -> None:
    """A forward that submits to its own runtime gets an error, not a deadlock."""

    def forward(_m: Any, x: Tensor) -> Tensor:
        return asyncio.run(asyncdp.data_parallel(nn.Identity(), x, "cpu*2"))

    if dp.form == "functional":
        with pytest.raises(NestedPassError):
            dp(Fn(forward), numbered(4))
    else:  # an engine's lanes are others than the default ones
        assert torch.equal(dp(Fn(forward), numbered(4)), numbered(4))


@pytest.mark.anyio
async def test_cancelled_pass_leaves_lanes_and_module_usable() -> None:
    """Contract 20: queued shards are dropped, running ones drain, and the next pass is right."""
    latch = Latch()
    ran: list[float] = []

    def forward(_m: Any, x: Tensor) -> Tensor:
        ran.append(float(x[0, 0]))
        if x[0, 0] == 0:
            latch.hold()
        return x * 2

    module = Fn(forward)
    async with asyncdp.DataParallel(module, "cpu*2") as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(engine, numbered(2))
            await latch.wait_entered()
            group.start_soon(engine, numbered(2) + 10)
            await wait_until(lambda: 11.0 in ran)
            group.cancel_scope.cancel()
            await anyio.lowlevel.cancel_shielded_checkpoint()
            latch.open()
        assert sorted(ran) == [0.0, 1.0, 11.0]
        assert engine.runtime.statistics().num_cancelled == 2
        assert torch.equal(await engine(numbered(4)[2:]), numbered(4)[2:] * 2)


@pytest.mark.anyio
async def test_parallel_apply_raises_the_first_failure() -> None:
    """Contract 9 holds for the verb alone."""
    errors = {0: ValueError("late"), 1: Odd(1, other=2)}
    module = Failing(errors, order=[1, 0])
    with pytest.raises(Odd) as caught:
        await asyncdp.parallel_apply([module, module], list(numbered(2).unsqueeze(1)), devices="cpu*2")
    assert caught.value is errors[1]
    assert "in replica 1 on lane cpu:1" in caught.value.__notes__
