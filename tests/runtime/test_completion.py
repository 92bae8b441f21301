"""How a finished pass lets the asyncio task that awaits it go on."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
from collections.abc import Callable
from functools import partial

import anyio
import anyio.lowlevel
import pytest
import torch

from asyncdp import Batcher
from asyncdp._loops.completion import Callback, look_of_loop, new_callback, new_completion
from asyncdp._runtime.lane import Lane
from asyncdp._runtime.wakeup import Look

from .helpers import runtime

name: contextvars.ContextVar[str] = contextvars.ContextVar("name")


def test_the_task_goes_on_without_another_turn_of_the_loop() -> None:
    """What was queued on the loop after a completion comes after the task that waited for it."""

    async def main() -> list[str]:
        order: list[str] = []
        completion = new_completion(lambda: None)

        async def wait() -> None:
            name.set("own")
            await completion
            order.append(f"task, in its {name.get()} context")

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        loop.call_soon(completion.settle)
        loop.call_soon(order.append, "the loop's next")
        await task
        return order

    assert asyncio.run(main()) == ["task, in its own context", "the loop's next"]


def test_an_interrupt_in_one_task_loses_no_other() -> None:
    """Of passes that end together, one whose task ends the loop leaves the others' tasks to go on later."""

    async def wait(completion: object, error: BaseException | None) -> str:
        await completion  # type: ignore[misc]
        if error is not None:
            raise error
        return "done"

    tasks: list[asyncio.Task[str]] = []

    async def main() -> None:
        completions = [new_completion(lambda: None) for _ in range(2)]
        errors = [KeyboardInterrupt(), None]
        tasks[:] = [asyncio.create_task(wait(*pair)) for pair in zip(completions, errors, strict=True)]
        await asyncio.sleep(0)
        for completion in completions:
            completion.finish()
        await asyncio.wait(tasks)

    loop = asyncio.new_event_loop()
    try:
        whole = loop.create_task(main())
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(whole)
        assert not tasks[1].done()
        loop.run_until_complete(whole)
        assert tasks[1].result() == "done"
        with pytest.raises(KeyboardInterrupt):
            tasks[0].result()
    finally:
        loop.close()


def test_a_second_waiter_is_told_too() -> None:
    """Whoever else waits for the same completion hears of it by the loop's next turn."""

    async def main() -> list[str]:
        heard: list[str] = []
        completion = new_completion(lambda: None)
        future = asyncio.ensure_future(completion)  # type: ignore[arg-type]
        future.add_done_callback(lambda _: heard.append("second"))

        async def wait() -> None:
            await completion
            heard.append("first")

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        completion.finish()
        await task
        await asyncio.sleep(0)
        return sorted(heard)

    assert asyncio.run(main()) == ["first", "second"]


def test_completions_that_follow_leave_the_loop_its_turn() -> None:
    """A task that goes on and finishes the next completion at once holds up nothing else on the loop."""

    async def main() -> list[str]:
        order: list[str] = []
        first, second = new_completion(lambda: None), new_completion(lambda: None)

        async def go_on() -> None:
            await first
            asyncio.get_running_loop().call_soon(order.append, "what was due")
            second.finish()

        async def wait() -> None:
            await second
            order.append("what followed")

        tasks = [asyncio.create_task(wait()), asyncio.create_task(go_on())]
        await asyncio.sleep(0)
        first.finish()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(main()) == ["what was due", "what followed"]


# --- a loop that waits awake -----------------------------------------------------------------


Meanwhile = Callable[[], object]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Meanwhile]:
    """What happens during each look of a loop, in turn; a look without anything to come fails."""
    script: list[Meanwhile] = []

    def take(self: Look, _: float = math.inf) -> None:
        if threading.current_thread() is threading.main_thread():
            script.pop(0)()

    monkeypatch.setattr(Look, "take", take)
    return script


def test_what_ends_during_a_look_is_settled_by_it(looks: list[Meanwhile]) -> None:
    """The loop hears of it at once, neither asleep nor woken."""
    heard: list[str] = []

    async def main() -> None:
        callback = new_callback(lambda: heard.append("callback"))
        callback.expect()
        looks.append(callback.finish)
        look_of_loop()()
        assert heard == ["callback"]
        completion = new_completion(lambda: None)
        completion.expect()
        looks.append(completion.finish)
        await completion  # the loop looks by itself

    asyncio.run(main())
    assert not looks


def test_a_look_waits_for_nothing_that_has_ended(looks: list[Meanwhile]) -> None:
    """What came before the look is settled without one; nothing expected, nothing is looked for."""
    heard: list[str] = []

    async def main() -> None:
        callback = new_callback(lambda: heard.append("callback"))
        callback.expect()
        callback.finish()
        look_of_loop()()
        assert heard == ["callback"]
        look_of_loop()()

    asyncio.run(main())


def test_what_was_expected_in_vain_keeps_no_later_look_away(looks: list[Meanwhile]) -> None:
    """A callback that woke the loop before anyone looked for it leaves the next pass its look."""

    async def main() -> None:
        heard = asyncio.Event()
        callback = new_callback(heard.set)
        callback.expect()
        callback.finish()
        await heard.wait()
        completion = new_completion(lambda: None)
        completion.expect()
        looks.append(completion.finish)
        asyncio.get_running_loop().call_later(5.0, completion.finish)  # without a look: fail, not hang
        await completion

    asyncio.run(main())
    assert not looks


def test_after_a_look_in_vain_the_loop_sleeps(looks: list[Meanwhile]) -> None:
    """Whoever is late wakes the loop as ever, and the next few are not looked for."""
    looked: list[str] = []

    async def main() -> None:
        for _ in range(2):
            for attempt in range(5):
                completion = new_completion(lambda: None)
                completion.expect()
                if attempt == 0:
                    looks.append(lambda: looked.append("in vain"))
                asyncio.get_running_loop().call_later(0.0, completion.finish)
                await completion

    asyncio.run(main())
    assert looked == ["in vain"] * 2


def test_an_interrupt_during_a_look_loses_nothing(looks: list[Meanwhile]) -> None:
    """What ended during a look that an interrupt broke off is settled all the same."""
    tasks: list[asyncio.Task[None]] = []

    def interrupted(callback: Callback) -> None:
        callback.finish()
        raise KeyboardInterrupt

    async def main() -> None:
        completion = new_completion(lambda: None)
        completion.expect()
        looks.append(lambda: interrupted(completion))
        await completion

    loop = asyncio.new_event_loop()
    try:
        tasks.append(loop.create_task(main()))
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(tasks[0])
        loop.run_until_complete(tasks[0])
    finally:
        loop.close()


@pytest.mark.anyio
@pytest.mark.parametrize("is_alert", [True, False])
async def test_a_loop_looks_for_what_alert_lanes_do(
    monkeypatch: pytest.MonkeyPatch, anyio_backend_name: str, is_alert: bool
) -> None:
    """A pass and a batch on an alert lane are waited for awake; on any other, and on trio, they are not."""
    num_looks = 0
    plain_take = Look.take

    def take(self: Look, seconds: float = math.inf) -> None:
        nonlocal num_looks
        num_looks += threading.current_thread() is threading.main_thread()
        plain_take(self, seconds)

    latch = threading.Event()

    def held(x: torch.Tensor) -> torch.Tensor:
        latch.wait()
        return x * 2

    monkeypatch.setattr(Look, "take", take)
    monkeypatch.setattr(Lane, "is_alert", is_alert)
    monkeypatch.setattr("asyncdp._loops.completion._NUM_SKIPPED", 0)
    looks = is_alert and anyio_backend_name == "asyncio"
    async with runtime(1) as rt, Batcher(held, runtime=rt) as batcher:

        async def let_go() -> None:
            # By then the pass runs and the loop has looked for its end, which cannot have come.
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            latch.set()

        for number, call in enumerate((partial(rt.run, latch.wait), partial(batcher, torch.tensor(2.0))), 1):
            latch.clear()
            with anyio.fail_after(30):
                async with anyio.create_task_group() as group:
                    group.start_soon(call)
                    group.start_soon(let_go)
            assert num_looks == looks * number
