"""The example service does what its page says."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("torch._dynamo")  # optimizers import it at first use, and the loop must not read files
pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")
pytest.importorskip("sklearn.datasets")

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "digits_service.py"


def load_example() -> Any:
    """Import the example as the program it is."""
    spec = importlib.util.spec_from_file_location("digits_service", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


@asynccontextmanager
async def client() -> AsyncIterator[Any]:
    """Open a client of the running service, in the same process."""
    transport = httpx.ASGITransport(app=example.app)
    async with (
        example.app.router.lifespan_context(example.app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as one,
    ):
        yield one


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # that of its server; it takes long
async def test_it_trains_while_it_answers() -> None:
    """Training reaches an accuracy of 0.97 on digits it never saw, and predictions are answered meanwhile."""
    async with client() as one:
        service = example.app.state.service
        assert (await one.post("/train")).status_code == 202
        first = service.digits.num_train
        images = (service.digits.images[first:] * 16).tolist()
        answers: list[list[int]] = []
        followed: list[str] = []

        async def follow() -> None:
            followed.append((await one.get("/progress")).text)

        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            while not followed:
                answer = await one.post("/predict", json={"images": images[:20]})
                answers.append(answer.json()["digits"])
        events = events_of(followed[0])
        assert [event["epoch"] for event in events[:-1]] == list(range(1, example.NUM_EPOCHS + 1))
        assert events[-1]["state"] == "done"
        assert events[-2]["accuracy"] >= 0.97
        assert events[-2]["loss"] < events[0]["loss"]
        assert len(answers) > 5
        last = (await one.post("/predict", json={"images": images})).json()["digits"]
        expected = service.digits.classes[first:].tolist()
        assert sum(map(int.__eq__, last, expected)) / len(last) == pytest.approx(events[-2]["accuracy"])


async def test_it_stops_cleanly() -> None:
    """A stopped training ends between two steps, and can be started again."""
    async with client() as one:
        service = example.app.state.service
        for _ in range(2):
            assert (await one.post("/train")).status_code == 202
            while service.engine.statistics().num_steps % 100 < 5:
                assert (await one.post("/predict", json={"images": [[0] * 64]})).status_code == 200
            assert (await one.post("/train")).status_code == 409
            assert (await one.post("/stop")).status_code == 204
            events = events_of((await one.get("/progress")).text)
            assert events[-1]["state"] == "stopped"
            steps = {int(state["step"]) for state in service.optimizer.state.values()}
            assert steps == {service.engine.statistics().num_steps}


async def test_leaving_ends_a_training() -> None:
    """When the service is shut down in the midst of a training, the training ends and so do the lanes."""
    async with client() as one:
        assert (await one.post("/train")).status_code == 202
        service = example.app.state.service
        while not service.engine.statistics().num_steps:
            await anyio.lowlevel.checkpoint()
    assert service.training is None
    assert "closed" in repr(service.engine.runtime)


async def test_mistakes_are_told() -> None:
    """A request without images gets an answer that says what was expected."""
    async with client() as one:
        answer = await one.post("/predict", json={"pictures": []})
        assert answer.status_code == 400
        assert "64 numbers" in answer.json()["error"]
