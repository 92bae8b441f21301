"""A web service that trains a classifier while it answers predictions and streams its progress.

Run it with `uvicorn digits_service:app` (pip install starlette uvicorn scikit-learn), then:

    curl -X POST localhost:8000/train
    curl -N localhost:8000/progress
    curl -X POST localhost:8000/predict -d '{"images": [[0, 0, 5, 13, ... 64 numbers from 0 to 16]]}'
    curl -X POST localhost:8000/stop
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

NUM_EPOCHS = 20
BATCH_SIZE = 64


class Digits:
    """The images of scikit-learn's digits and their classes, the last fifth for testing."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        self.images = torch.tensor(data.data, dtype=torch.float32)[order] / 16
        self.classes = torch.tensor(data.target)[order]
        self.num_train = len(order) * 4 // 5


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
        self.training: anyio.CancelScope | None = None
        self.events: list[dict[str, Any]] = []
        self.changed = anyio.Event()

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
                    self.tell({"state": "training", "epoch": epoch, "loss": loss, "accuracy": accuracy})
                state = "done"
        finally:
            self.training = None
            self.tell({"state": state, "num_steps": self.engine.statistics().num_steps})

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
        found = await self.classify(self.digits.images[first:])
        return (found == self.digits.classes[first:]).float().mean().item()

    async def classify(self, images: Tensor) -> Tensor:
        """Classify on whichever lane has the least to do, training or not."""

        def on_lane() -> Tensor:
            with torch.inference_mode():  # in the lane: here it would leak into every task of the loop
                return self.module(images).argmax(1)

        return await self.engine.runtime.run(on_lane)

    def tell(self, event: dict[str, Any]) -> None:
        """Send an event to everyone who follows the progress."""
        self.events.append(event)
        self.changed.set()
        self.changed = anyio.Event()

    async def follow(self) -> AsyncIterator[str]:
        """Yield the latest training as server-sent events, from its beginning to its end."""
        sent = 0
        while True:
            changed, events = self.changed, self.events
            for event in events[sent:]:
                yield f"data: {json.dumps(event)}\n\n"
            sent = len(events)
            if events and events[-1]["state"] != "training":
                return
            await changed.wait()


async def start(request: Request) -> Response:
    """Begin to train, unless training is under way."""
    service: Service = request.app.state.service
    if service.training is not None:
        return JSONResponse({"error": "training is under way"}, status_code=409)
    service.events, service.training = [], anyio.CancelScope()
    request.app.state.tasks.start_soon(service.train, service.training)
    return JSONResponse({"state": "training"}, status_code=202)


async def stop(request: Request) -> Response:
    """Stop the training; a step under way is finished or undone, never left half done."""
    service: Service = request.app.state.service
    if service.training is not None:
        service.training.cancel()
    return Response(status_code=204)


async def progress(request: Request) -> Response:
    """Stream what happens, until the training ends."""
    return StreamingResponse(request.app.state.service.follow(), media_type="text/event-stream")


async def predict(request: Request) -> Response:
    """Classify images of 64 numbers from 0 to 16."""
    service: Service = request.app.state.service
    try:
        images = torch.tensor((await request.json())["images"], dtype=torch.float32).reshape(-1, 64)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        return JSONResponse({"error": f"expected images of 64 numbers each: {error}"}, status_code=400)
    return JSONResponse({"digits": (await service.classify(images / 16)).tolist()})


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Make the service; on the way out stop the training and end the lanes."""
    service = app.state.service = Service()
    async with service.engine, anyio.create_task_group() as tasks:
        app.state.tasks = tasks
        await service.load()
        yield
        tasks.cancel_scope.cancel()


app = Starlette(
    routes=[
        Route("/train", start, methods=["POST"]),
        Route("/stop", stop, methods=["POST"]),
        Route("/progress", progress),
        Route("/predict", predict, methods=["POST"]),
    ],
    lifespan=lifespan,
)
