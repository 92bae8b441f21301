"""A web service that trains a classifier while it answers predictions and streams its progress.

Run it with `uvicorn digits_service:app` (pip install starlette uvicorn scikit-learn), then open
http://localhost:8000, where one can watch it learn and draw digits, or:

    curl -X POST localhost:8000/train
    curl -N localhost:8000/progress
    curl -X POST localhost:8000/predict -d '{"images": [[0, 0, 5, 13, ... 64 numbers from 0 to 16]]}'
    curl -X POST localhost:8000/stop
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import torch
import web
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

NUM_EPOCHS = 20
BATCH_SIZE = 64
MAX_IMAGES = 512  # of one request
MAX_QUEUE = 64  # requests that wait
MAX_FOLLOWERS = 64  # of the progress at the same time
TIMEOUT = 10.0  # seconds that a prediction may take

logger = logging.getLogger("service")
show_page = web.page("digits_service.html")


class Digits:
    """The images of scikit-learn's digits and their classes, the last fifth for testing."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        self.images = torch.tensor(data.data, dtype=torch.float32)[order] / 16
        self.classes = torch.tensor(data.target)[order]
        self.num_train = len(order) * 4 // 5


class Progress:
    """What has happened in one training, for any number of followers."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.is_over = False
        self._changed = anyio.Event()

    def tell(self, *, is_last: bool = False, **event: Any) -> None:
        """Send an event to everyone who follows."""
        self.events.append(event)
        self.is_over = is_last
        self._changed.set()
        self._changed = anyio.Event()

    async def follow(self) -> AsyncIterator[str]:
        """Yield the training as server-sent events, from its beginning to its end."""
        num_sent = 0
        while True:
            changed = self._changed
            for event in self.events[num_sent:]:
                yield f"data: {json.dumps(event)}\n\n"
            num_sent = len(self.events)
            if self.is_over:
                return
            await changed.wait()


class Service:
    """One classifier, trained in the background."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        self.optimizer = torch.optim.AdamW(self.module.parameters(), 3e-3)
        self.engine = asyncdp.DataParallel(self.module)
        # Requests wait here, not for the training: each sees the weights of one whole step.
        self.batcher = asyncdp.Batcher(
            self.engine.in_mode(training=False),
            collate=torch.cat,
            split=split,
            max_queue=MAX_QUEUE,
            timeout=TIMEOUT,
            hang_timeout=TIMEOUT,
        )
        self.training: anyio.CancelScope | None = None
        self.progress = Progress()
        self.progress.is_over = True  # until the first training
        self.num_followers = 0

    async def load(self) -> None:
        """Read the images on a lane, so that the loop stays free."""
        self.digits = await self.engine.runtime.run(Digits)

    async def train(self, scope: anyio.CancelScope) -> None:
        """Train from the present weights, until it is done or `scope` is cancelled."""
        state = "stopped"
        try:
            with scope:
                for epoch in range(1, NUM_EPOCHS + 1):
                    loss = await self.train_epoch()
                    accuracy = await self.test()
                    self.progress.tell(state="training", epoch=epoch, loss=loss, accuracy=accuracy)
                state = "done"
        except Exception:
            state = "failed"
            logger.exception("the training failed")
        finally:
            self.training = None
            self.progress.tell(is_last=True, state=state, num_steps=self.engine.statistics().num_steps)

    async def train_epoch(self) -> float:
        """Take one step for every batch; return the mean loss."""
        batches = torch.randperm(self.digits.num_train).split(BATCH_SIZE)
        total = 0.0
        for rows in batches:
            images, classes = self.digits.images[rows], self.digits.classes[rows]
            loss = await self.engine.train_step(images, classes, functional.cross_entropy, self.optimizer)
            total += loss.item()
        return total / len(batches)

    async def test(self) -> float:
        """Return the share of test images that are classified correctly."""
        first = self.digits.num_train
        # Before the requests that wait, and after any time: a training does not end by a busy minute.
        scores = await self.batcher(self.digits.images[first:], timeout=3600.0, priority=1)
        return (scores.argmax(1) == self.digits.classes[first:]).float().mean().item()

    async def classify(self, images: Tensor) -> Tensor:
        """Return the classes of images, on whichever lane is free, training or not.

        Raises:
            QueueFull: too many others wait.
        """
        scores = await self.batcher.call_nowait(images)
        return scores.argmax(1)

    async def follow(self) -> AsyncIterator[str]:
        """Follow the latest training, as one of so many."""
        self.num_followers += 1
        try:
            async with contextlib.aclosing(self.progress.follow()) as events:
                async for event in events:
                    yield event
        finally:
            self.num_followers -= 1


def split(output: Tensor, samples: Sequence[Tensor]) -> Sequence[Tensor]:
    """Give each request the rows of its images."""
    return output.split([len(images) for images in samples])


def check_images(body: Any) -> Tensor:
    """Return the images of a request [images, 64], from 0 to 1.

    Raises:
        Refusal: the body is not of the form `{"images": [[64 numbers], ...]}`, or has too many.
    """
    images = body.get("images") if isinstance(body, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, list) for image in images):
        raise web.Refusal(400, 'expected {"images": [[64 numbers from 0 to 16], ...]}')
    if not 1 <= len(images) <= MAX_IMAGES:
        raise web.Refusal(400, f"expected 1 to {MAX_IMAGES} images, but got {len(images)}")
    for place, image in enumerate(images):
        if len(image) != 64 or not all(type(value) in (int, float) and 0 <= value <= 16 for value in image):
            raise web.Refusal(400, f"image {place} does not consist of 64 numbers from 0 to 16")
    return torch.tensor(images, dtype=torch.float32) / 16


async def start(request: Request) -> Response:
    """Begin to train, unless training is under way."""
    service: Service = request.app.state.service
    if service.training is not None:
        return JSONResponse({"error": "training is under way"}, status_code=409)
    service.progress, service.training = Progress(), anyio.CancelScope()
    request.app.state.tasks.start_soon(service.train, service.training)
    return JSONResponse({"state": "training"}, status_code=202)


async def stop(request: Request) -> Response:
    """Stop the training; a step under way is finished or undone, never left half done."""
    service: Service = request.app.state.service
    if service.training is not None:
        service.training.cancel()
    return Response(status_code=204)


async def progress(request: Request) -> Response:
    """Stream what happens, until the training ends; at once if none is under way."""
    service: Service = request.app.state.service
    if service.num_followers >= MAX_FOLLOWERS:
        return JSONResponse({"error": "too many follow the training"}, 503, {"Retry-After": "10"})
    return StreamingResponse(service.follow(), media_type="text/event-stream")


@web.json_endpoint
async def predict(request: Request, body: Any) -> Response:
    """Classify images of 64 numbers from 0 to 16."""
    images = check_images(body)
    digits = await request.app.state.service.classify(images)
    return JSONResponse({"digits": digits.tolist()})


async def status(request: Request) -> Response:
    """Tell whether it trains, and how many predictions wait and were made."""
    service: Service = request.app.state.service
    stats = service.batcher.statistics()
    told = {
        "training": service.training is not None,
        "num_steps": service.engine.statistics().num_steps,
        "num_followers": service.num_followers,
        "num_queued": stats.num_queued,
        "num_done": stats.num_done,
    }
    return JSONResponse(told)


async def healthz(request: Request) -> Response:
    """Tell whether this process is worth keeping."""
    return web.healthz(request.app.state.service.engine.runtime)


async def readyz(request: Request) -> Response:
    """Tell whether to send requests here."""
    service: Service = request.app.state.service
    return web.readyz(service.engine.runtime, service.batcher, MAX_QUEUE)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Make the service; on the way out stop the training and end the lanes."""
    service = app.state.service = Service()
    app.state.batcher = service.batcher
    async with service.engine, service.batcher, anyio.create_task_group() as tasks:
        app.state.tasks = tasks
        await service.load()
        yield
        tasks.cancel_scope.cancel()


app = Starlette(
    routes=[
        Route("/", show_page),
        Route("/train", start, methods=["POST"]),
        Route("/stop", stop, methods=["POST"]),
        Route("/progress", progress),
        Route("/predict", predict, methods=["POST"]),
        Route("/status", status),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
    ],
    lifespan=lifespan,
)
