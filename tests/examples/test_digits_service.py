"""The digits service does what its page says."""

from __future__ import annotations

import importlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import torch

from tests.examples.browser import open_browser
from tests.examples.server import Server
from tests.runtime.helpers import Latch, wait_until

pytest.importorskip("torch._dynamo")  # optimizers import it at first use, and the loop must not read files
pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")
pytest.importorskip("sklearn.datasets")

pytestmark = pytest.mark.anyio

example: Any = importlib.import_module("digits_service")


@asynccontextmanager
async def client() -> AsyncIterator[Any]:
    """Open a client of the running service, in the same process."""
    transport = httpx.ASGITransport(app=example.app)
    async with (
        example.app.router.lifespan_context(example.app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as one,
    ):
        yield one


@pytest.fixture(name="one")
async def of_one() -> AsyncIterator[Any]:
    async with client() as opened:
        yield opened


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


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{", "no JSON"),
        ("[" * 200_000, "nested too deeply"),
        ('{"pictures": []}', "64 numbers"),
        ('{"images": "\\ud800"}', "64 numbers"),
        ('{"images": [5]}', "64 numbers"),
        ('{"images": []}', "1 to 512 images"),
        (json.dumps({"images": [[0]] * 513}), "but got 513"),
        (json.dumps({"images": [[0] * 64, [0] * 65]}), "image 1 does not consist of 64 numbers from 0 to 16"),
        (json.dumps({"images": [[17] + [0] * 63]}), "from 0 to 16"),
        (json.dumps({"images": [[float("nan")] * 64]}), "from 0 to 16"),
        (json.dumps({"images": [[10**400] * 64]}), "from 0 to 16"),
        (json.dumps({"images": [[True] * 64]}), "64 numbers"),
        (json.dumps({"images": [[None] * 64]}), "64 numbers"),
        (json.dumps({"images": [[[0]] * 64]}), "64 numbers"),
    ],
)
async def test_mistakes_are_told(one: Any, body: str, reason: str) -> None:
    """A request without images gets an answer that says what was expected."""
    answer = await one.post("/predict", content=body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


async def test_a_long_body_is_refused(one: Any) -> None:
    """More than a MiB is not read as JSON."""
    assert (await one.post("/predict", content=b" " * (1 << 21))).status_code == 413


async def test_load_beyond_the_queue_is_shed(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While too many predictions wait, others get 429 and the time to come back, and training its turn."""
    service = example.app.state.service
    latch = Latch()
    monkeypatch.setattr(service.module, "forward", lambda x: latch.hold() or torch.zeros(len(x), 10))
    answers: list[int] = []

    async def ask() -> None:
        answers.append((await one.post("/predict", json={"images": [[0] * 64]})).status_code)

    num_slots = len(service.engine.lanes)
    async with anyio.create_task_group() as group:
        for _ in range(num_slots):
            group.start_soon(ask)
        await wait_until(lambda: service.batcher.statistics().num_running == num_slots)
        for _ in range(example.MAX_QUEUE):
            group.start_soon(ask)
        await wait_until(lambda: service.batcher.statistics().num_queued == example.MAX_QUEUE)
        refused = await one.post("/predict", json={"images": [[0] * 64]})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert (await one.get("/readyz")).status_code == 503
        group.start_soon(service.test)
        await wait_until(lambda: service.batcher.statistics().num_outside == 1)
        latch.open()
    assert answers == [200] * (num_slots + example.MAX_QUEUE)
    assert (await one.get("/readyz")).status_code == 200
    assert (await one.get("/healthz")).json()["healthy"]


async def test_a_training_that_fails_is_told(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Followers hear of it, predictions go on, and the next training may begin."""

    async def fail() -> float:
        raise RuntimeError("no memory")

    for _ in range(2):
        monkeypatch.setattr(example.app.state.service, "train_epoch", fail)
        assert (await one.post("/train")).status_code == 202
        events = events_of((await one.get("/progress")).text)
        assert [event["state"] for event in events] == ["failed"]
        assert (await one.post("/predict", json={"images": [[0] * 64]})).status_code == 200
    assert events_of((await one.get("/progress")).text) == events


async def test_progress_is_limited(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any training the stream ends at once; with too many followers there is none."""
    assert (await one.get("/progress")).text == ""
    monkeypatch.setattr(example, "MAX_FOLLOWERS", 0)
    assert (await one.get("/progress")).status_code == 503


def test_the_page_shows_the_training_live() -> None:
    """In a browser: the curve grows while it trains, a drawn digit is classified, and it stops."""
    pytest.importorskip("uvicorn")
    server = Server(example.app)
    try:
        with open_browser() as page:
            page.open(server.url)
            page.wait("find('state').textContent.startsWith('idle')")
            page.run("find('train').click()")
            page.wait("find('loss').points.numberOfItems >= 2")
            assert "accuracy" in page.text("#latest")
            assert page.wait("find('train').disabled && !find('stop').disabled")
            page.run("for (let y = 1; y < 7; y++) paint(find('grid').children[8 * y + 3])")
            assert page.run("pixels.filter(value => value === 16).length") == 6
            page.run("find('grid').dispatchEvent(new PointerEvent('pointerup'))")
            assert page.wait("find('digit').textContent") in set("0123456789")
            page.run("find('stop').click()")
            page.wait("find('state').textContent.startsWith('idle')")
            num_epochs = page.run("epochs.length")
            page.open(server.url)  # somebody who comes later sees it, too
            page.wait(f"find('accuracy').points.numberOfItems === {num_epochs}")
            assert page.problems == []
            assert all(url.startswith((server.url, "data:")) for url in page.urls)
    finally:
        server.stop()


def test_the_page_can_be_used_by_keys_alone() -> None:
    """A visitor without a mouse or eyesight takes a sample, draws and rubs out; everything has a name."""
    pytest.importorskip("uvicorn")
    server = Server(example.app)
    try:
        with open_browser() as page:
            page.open(server.url)
            page.wait("find('state').textContent.startsWith('idle')")
            named = page.names()
            assert all(name for _, name in named)
            assert {("application", "Eight by eight cells to draw on"), ("button", "Sample of a 7")} <= {
                *named
            }
            page.press("Tab", 2)  # Train, the cells: there is nothing to stop
            assert page.run("document.activeElement.id") == "grid"
            assert page.text("#cell") == "row 1, column 1: 0 of 16"
            page.press("ArrowDown")
            page.press("ArrowRight", 9)
            page.press(" ")
            assert page.text("#cell") == "row 2, column 8: 16 of 16"
            page.press("Delete")
            assert page.text("#cell") == "row 2, column 8: 0 of 16"
            page.press("Tab", 8)
            assert page.run("document.activeElement.ariaLabel") == "Sample of a 7"
            page.press("Enter")
            assert page.run("pixels.join() === [...samples[7]].map(each => parseInt(each, 17)).join()")
            assert page.wait("find('digit').textContent") in set("0123456789")
            assert page.problems == []
    finally:
        server.stop()
