"""How a finished pass lets the asyncio task that awaits it go on."""

from __future__ import annotations

import asyncio

import pytest

from asyncdp import _loops


def test_an_interrupt_in_one_call_loses_no_other() -> None:
    """Of passes that end together, one whose call ends the loop leaves the others for when it runs again."""
    heard: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        ended = asyncio.Event()
        for function in (interrupt, lambda: heard.append("second"), ended.set):
            _loops.current().callback(function).finish()
        await ended.wait()

    loop = asyncio.new_event_loop()
    try:
        whole = loop.create_task(main())
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(whole)
        assert not heard
        loop.run_until_complete(whole)
        assert heard == ["second"]
    finally:
        loop.close()


def test_every_waiter_of_a_completion_goes_on() -> None:
    """Another task that waits for the same completion hears of it as well."""

    async def main() -> list[str]:
        heard: list[str] = []
        completion = _loops.current().completion(lambda: None)
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
        first, second = (_loops.current().completion(lambda: None) for _ in range(2))

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


@pytest.mark.anyio
async def test_a_loop_is_one_object() -> None:
    """Who asks for the running loop twice gets the same object, on asyncio and on trio."""
    assert _loops.is_running()
    assert _loops.current() is _loops.current()
    assert not _loops.current().is_cancelled()


def test_without_a_loop_there_is_none() -> None:
    """Outside of any event loop this is said by an error, and nothing counts as running."""
    assert not _loops.is_running()
    with pytest.raises(RuntimeError):
        _loops.current()
