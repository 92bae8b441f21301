"""What the example services share: bodies with limits, clients that leave, errors as statuses, health.

Copy it beside the service that imports it. It runs on asyncio and on trio.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from asyncdp import Batcher, LaneState, QueueFull, Runtime
from asyncdp.errors import BatcherClosedError, CallTimeoutError, DeviceLostError, LaneHungError

MAX_BODY = 1 << 20  # bytes
MAX_DISCARDED = 64 << 20  # bytes of a body that are read although it is too long
BODY_SECONDS = 10.0  # for a body to arrive
LONGEST_RETRY = 60  # seconds that a client is asked to wait, at most

# Nothing from elsewhere runs or loads in the pages, whatever texts they show.
_CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        "script-src 'unsafe-inline'",
        "style-src 'unsafe-inline'",
    )
)

_logger = logging.getLogger("service")

Endpoint = Callable[[Request, Any], Awaitable[Response]]


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: of the answer.
        reason: for the client.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def json_endpoint(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Make an endpoint of a function of a request and its body, which was JSON.

    The function is cancelled when its client leaves. What it raises is answered with the status that fits:
    429 and 503 say when to try again.
    """

    @functools.wraps(endpoint)
    async def wrapped(request: Request) -> Response:
        try:
            body = await read_json(request)
        except Refusal as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status)
        except ClientDisconnect:
            return Response(status_code=499)
        return await while_connected(request, lambda: _answer(endpoint, request, body))

    return wrapped


async def read_json(request: Request) -> Any:
    """Read a body of JSON, no longer than it may be.

    Raises:
        Refusal: 413 if it is too long, 408 if it does not arrive in time, 400 if it is no JSON.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > (MAX_BODY if _asks_first(request) else MAX_DISCARDED):
        raise _too_long()
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async with contextlib.aclosing(request.stream()) as parts:
                await _read(parts, body)
        return json.loads(body)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON: {error}") from None


async def _read(parts: AsyncIterator[bytes], body: bytearray) -> None:
    """Collect a body; one that is too long is read to its end, or its client would not see the answer."""
    size = 0
    async for part in parts:
        size += len(part)
        if size <= MAX_BODY:
            body += part
        elif size > MAX_DISCARDED:
            break
    if size > MAX_BODY:
        raise _too_long()


def _too_long() -> Refusal:
    return Refusal(413, f"the body has more than {MAX_BODY} bytes")


def _asks_first(request: Request) -> bool:
    """Return whether the client waits for an answer before it sends the body."""
    return request.headers.get("expect", "").lower() == "100-continue"


async def while_connected(request: Request, work: Callable[[], Awaitable[Response]]) -> Response:
    """Return what `work` answers; cancel it when the client, for whom it is, leaves.

    Args:
        request: whose body has been read, so that all that can still come is the client's leaving.
        work: must not raise.
    """
    response = Response(status_code=499)  # for nobody

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        response = await work()
        group.cancel_scope.cancel()
    return response


async def _answer(endpoint: Endpoint, request: Request, body: Any) -> Response:
    try:
        return await endpoint(request, body)
    except Refusal as error:
        return JSONResponse({"error": str(error)}, error.status)
    except QueueFull as error:
        return JSONResponse({"error": str(error)}, 429, _retry_after(request))
    except CallTimeoutError as error:
        return JSONResponse({"error": str(error)}, 504)
    except (DeviceLostError, LaneHungError, BatcherClosedError) as error:
        return JSONResponse({"error": str(error)}, 503, _retry_after(request))
    except Exception as error:
        # What a model says of an input may tell more than a client should know.
        _logger.warning("a request failed", exc_info=error)
        return JSONResponse({"error": "the model failed on this input"}, 500)


def _retry_after(request: Request) -> dict[str, str]:
    return {"Retry-After": str(seconds_to_wait(request.app.state.batcher))}


def seconds_to_wait(batcher: Batcher) -> int:
    """Return how long calls have waited of late: what is queued now will be done by then."""
    return _seconds_to_wait(batcher, int(time.perf_counter()))


@functools.lru_cache(maxsize=1)
def _seconds_to_wait(batcher: Batcher, _second: int) -> int:
    # At most once a second, as making percentiles takes longer than all else that a refusal costs.
    stats = batcher.statistics()
    return max(1, min(LONGEST_RETRY, math.ceil(stats.wait.p90 + stats.run.p90)))


def healthz(runtime: Runtime) -> Response:
    """Tell whether the process is worth keeping: 503 once no lane works, which a new start may mend.

    `suspect` names lanes whose task runs for too long, by what it is and for how many seconds.
    """
    lanes = runtime.statistics().lanes
    now = time.perf_counter()
    is_live = any(lane.state is LaneState.OPEN for lane in lanes)
    suspect = {
        lane.name: {"task": lane.task_label, "seconds": round(now - (lane.task_started or now), 3)}
        for lane in lanes
        if lane.state is LaneState.SUSPECT
    }
    told = {
        "live": is_live,
        "healthy": all(lane.state is LaneState.OPEN for lane in lanes),
        "lanes": {lane.name: lane.state.value for lane in lanes},
        "suspect": suspect,
    }
    return JSONResponse(told, 200 if is_live else 503)


def readyz(runtime: Runtime, batcher: Batcher, max_queue: int) -> Response:
    """Tell whether to send requests here: 503 while no lane works or the queue is full."""
    reason = None
    if not any(lane.state is LaneState.OPEN for lane in runtime.lanes):
        reason = "no lane works"
    elif batcher.statistics().num_queued >= max_queue:
        reason = "the queue is full"
    headers = {} if reason is None else {"Retry-After": str(seconds_to_wait(batcher))}
    return JSONResponse({"ready": reason is None, "reason": reason}, 503 if reason else 200, headers)


def page(name: str) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint of a page that lies beside this file."""
    text = Path(__file__).with_name(name).read_text()

    async def show(request: Request) -> Response:
        return HTMLResponse(text, headers={"Content-Security-Policy": _CONTENT_POLICY})

    return show
