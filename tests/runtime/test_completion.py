"""How a finished pass lets the asyncio task that awaits it go on."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from asyncdp._runtime.completion import new_completion

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
