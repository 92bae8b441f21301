"""A client of the embedding service that makes load: closed loop, open loop, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

BROKEN = 0
"""The status of a request whose connection broke before there was an answer."""

Ask = Callable[[], Awaitable[int]]


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        status: of HTTP, or `BROKEN`.
        began: when it was sent or, in an open loop, was to be sent, by `time.perf_counter`.
        seconds: from then on until the whole answer was there.
    """

    status: int
    began: float
    seconds: float


@contextlib.contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a service; give its process and its address. `--port` is added to the command."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen([sys.executable, *command, "--port", str(port)])
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session with a service, as soon as that is ready."""
    # Servers close connections that were idle for some seconds, just as a request may be on its way.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        for _ in range(600):
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get("/readyz") as answer:
                    if answer.status == 200:
                        break
            await asyncio.sleep(0.2)
        else:
            raise SystemExit(f"no service is ready at {url}")
        yield session


async def embed(session: aiohttp.ClientSession, texts: Sequence[str]) -> tuple[int, Any]:
    """Ask for vectors; return the status and the answer, which was JSON."""
    try:
        async with session.post("/embed", json={"texts": texts}) as answer:
            return answer.status, await answer.json()
    except (aiohttp.ClientError, OSError) as error:
        return BROKEN, {"error": repr(error)}


async def closed_loop(ask: Ask, num_clients: int, seconds: float) -> list[Answer]:
    """Have clients ask for some time, each anew when it has its answer."""
    answers: list[Answer] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while (began := time.perf_counter()) < end:
            status = await ask()
            answers.append(Answer(status, began, time.perf_counter() - began))

    await asyncio.gather(*[client() for _ in range(num_clients)])
    return answers


async def open_loop(ask: Ask, rate: float, seconds: float, chance: random.Random) -> list[Answer]:
    """Ask at random moments, so many times a second on average, whatever the answers do.

    A request is timed from the moment it was to be sent: what makes it late is not its own fault.
    """
    answers: list[Answer] = []
    due = started = time.perf_counter()

    async def one(began: float) -> None:
        status = await ask()
        answers.append(Answer(status, began, time.perf_counter() - began))

    async with asyncio.TaskGroup() as group:
        while (due := due + chance.expovariate(rate)) < started + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(due))
    return answers


def percentiles(answers: Sequence[Answer], status: int = 200) -> dict[str, float]:
    """Return p50, p90, p99 and the longest time of answers with a status, in seconds; nothing of none."""
    times = sorted(answer.seconds for answer in answers if answer.status == status)
    if not times:
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {name: times[int(len(times) * share)] for name, share in shares.items()} | {"longest": times[-1]}


def statuses(answers: Sequence[Answer]) -> dict[str, int]:
    """Count answers by status."""
    return {str(status): count for status, count in sorted(Counter(each.status for each in answers).items())}
