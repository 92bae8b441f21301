"""A deployment of Ray Serve: texts in over HTTP, what a model makes of them out, batched over all lanes.

    pip install 'asyncdp[ray,embed]' 'ray[serve]'
    serve run --working-dir docs/examples ray_serve:build model=/models/all-MiniLM-L6-v2 num_cpus=4
    curl -s localhost:8000 -d '{"texts": ["a sentence", "another one"]}'

Each replica holds one engine and one batcher, in which the requests of all clients meet. Serve asks each for
its health, and before it ends one it lets it answer what waits.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from asyncdp.errors import CallTimeoutError
from asyncdp.ray import InferenceActor

MAX_TEXTS = 256  # of one request
TIMEOUT = 30.0  # seconds that a request may take
HANG_TIMEOUT = 10.0  # seconds after which a task makes its lane suspect


class Texts:
    """A replica: one model on all lanes that Ray has given to it.

    Args:
        model: a Hugging Face folder, or what else `InferenceActor` takes for rows.
        **options: as for `InferenceActor`.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.actor = InferenceActor(
            model, hang_timeout=HANG_TIMEOUT, batcher={"max_queue": 1024, "timeout": TIMEOUT}, **options
        )

    async def __call__(self, request: Request) -> Response:
        """Answer with one entry for each text."""
        try:
            texts = check_texts(json.loads(await request.body()))
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        calls = [asyncio.ensure_future(self.actor.run_sample(text)) for text in texts]
        try:
            rows = await asyncio.gather(*calls)
        except CallTimeoutError as error:
            return JSONResponse({"error": str(error)}, 504)
        finally:
            for call in calls:  # of a client that has left, or whose other text was refused
                call.cancel()
        return JSONResponse({"rows": [plain(row) for row in rows]})

    async def check_health(self) -> None:
        """Fail once no lane works: Serve then starts another replica in the place of this one."""
        await self.actor.check_health()

    async def __del__(self) -> None:
        """Answer what waits and end the lanes; Serve awaits it when it stops a replica."""
        await self.actor.aclose(timeout=10)


def check_texts(body: Any) -> list[str]:
    """Return the texts of a request.

    Raises:
        ValueError: it is not of the form `{"texts": ["...", ...]}`, or has too many.
    """
    texts = body.get("texts") if isinstance(body, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('expected {"texts": ["a text", ...]}')
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise ValueError(f"expected 1 to {MAX_TEXTS} texts, but got {len(texts)}")
    return texts


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with lists and numbers of Python, for JSON."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}


def build(arguments: Mapping[str, str]) -> Any:
    """Make the application for `serve run`, from its `name=value`."""
    from ray import serve

    deployment = serve.deployment(
        Texts,
        num_replicas=int(arguments.get("num_replicas", "1")),
        max_ongoing_requests=256,  # the batcher decides what runs together
        max_queued_requests=1024,  # beyond that Serve answers 503
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=20,
        ray_actor_options={
            "num_cpus": int(arguments.get("num_cpus", "1")),
            "num_gpus": int(arguments.get("num_gpus", "0")),
        },
    )
    return deployment.bind(arguments["model"])
