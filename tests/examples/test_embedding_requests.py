"""What the embedding service does with requests, good and bad, over fake devices and both event loops."""

from __future__ import annotations

import importlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch

from asyncdp.infer.model.embed import PadTokens
from asyncdp.testing import FakeDevice, fake_devices
from tests.runtime.helpers import PATIENCE, Clock, Latch, wait_until

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
example: Any = importlib.import_module("embedding_service")
web: Any = importlib.import_module("web")

pytestmark = pytest.mark.anyio

POISON = "\N{SKULL AND CROSSBONES}"
HANGS = "\N{HOURGLASS}"


class Encoder(torch.nn.Module):
    """The vector of a text is the sum of its characters' numbers; one of them makes it raise, one hang."""

    def __init__(self) -> None:
        super().__init__()
        self.latch = Latch()

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> dict[str, torch.Tensor]:
        if (input_ids == ord(POISON)).any():
            raise ValueError("poison")
        if (input_ids == ord(HANGS)).any():
            self.latch.hold()
        return {"embedding": input_ids.sum(1, keepdim=True).float()}

    def __deepcopy__(self, memo: Any) -> Encoder:
        return self  # all lanes hang by one latch


def tokenize(texts: Sequence[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] or [0] for text in texts]


@asynccontextmanager
async def serve(
    devices: Sequence[FakeDevice] = (),
    *,
    timeout: float = 30.0,
    hang_timeout: float = 20.0,
    preprocess: Any = tokenize,
) -> AsyncIterator[Any]:
    """Run the service in this process, and open a client of it."""
    steps = SimpleNamespace(preprocess=preprocess, collate=PadTokens(0))
    service = example.Service(Encoder(), steps, list(devices) or fake_devices(1), timeout, hang_timeout)
    transport = httpx.ASGITransport(app=service.app)
    async with (
        service.app.router.lifespan_context(service.app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        client.service = service
        yield client


async def status_of(service: Any, receive: Any) -> int:
    """Post what `receive` gives, message by message."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/embed", "headers": [], "query_string": b""}
    await service.app(scope, receive, send)
    return int(sent[0]["status"])


async def embed(client: Any, *texts: str) -> Any:
    return await client.post("/embed", json={"texts": texts})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe\xfd", "no JSON"),
        (b'{"texts": ["\xff"]}', "no JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"texts": ' * 50_000, "nested too deeply"),
        (b'{"texts": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"texts": ["\\ud800"]}', "half of a surrogate pair"),
        (b'{"texts": ["fine", "x\\udfff\\ud83d"]}', "text 1 is no Unicode"),
        (b'{"texts": [null]}', "expected"),
        (b'{"texts": {"0": "a"}}', "expected"),
        (b'"texts"', "expected"),
        (b'{"texts": []}', "1 to 256 texts"),
        (json.dumps({"texts": ["a"] * 257}).encode(), "but got 257"),
        (json.dumps({"texts": ["a", "a" * 10_001]}).encode(), "text 1 has 10001 characters"),
    ],
)
async def test_bad_bodies_are_told_before_anything_is_tokenized(body: bytes, reason: str) -> None:
    """Whatever is wrong with a body, the answer is 400 with the reason, and no batcher saw it."""
    async with serve() as client:
        answer = await client.post("/embed", content=body)
        assert answer.status_code == 400
        assert reason in answer.json()["error"]
        assert client.service.tokenizer.statistics().num_batches == 0


@pytest.mark.parametrize(
    ("headers", "num_read"),
    [
        ({}, 64),
        ({"Content-Length": str(64 << 16)}, 64),
        ({"Content-Length": str(64 << 16), "Expect": "100-continue"}, 0),
        ({"Content-Length": str(1 << 40)}, 0),
    ],
)
async def test_long_bodies_are_refused(headers: dict[str, str], num_read: int) -> None:
    """More than a MiB gets 413, after what the client sends anyway, unless that is far too much."""
    num_sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(64):
            num_sent += 1
            yield b" " * (1 << 16)

    async with serve() as client:
        answer = await client.post("/embed", content=parts(), headers=headers)
        assert answer.status_code == 413
        assert num_sent == num_read


async def test_a_body_without_end_is_read_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never stops sending gets 413 after some of it."""
    monkeypatch.setattr(web, "MAX_DISCARDED", 1 << 21)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b" " * (1 << 16), "more_body": True}

    async with serve() as client:
        assert await status_of(client.service, receive) == 413


async def test_what_is_allowed_is_answered() -> None:
    """The longest texts, the most of them, empty ones and any Unicode get vectors."""
    async with serve() as client:
        for texts in (["a" * 10_000], ["a"] * 256, ["", "\0", "\N{GRINNING FACE}", "ａ́"]):
            answer = await embed(client, *texts)
            assert answer.status_code == 200
            expected = [[float(sum(map(ord, text)))] for text in texts]
            assert answer.json() == {"vectors": expected}


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends half of a body gets 408 when its time is over."""
    monkeypatch.setattr(web, "BODY_SECONDS", 0.01)

    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        await anyio.sleep_forever()

    async with serve() as client:
        assert (await client.post("/embed", content=parts())).status_code == 408


async def test_a_bad_text_fails_alone() -> None:
    """The request whose text makes the model raise gets 500, without its words; others their vectors."""
    device = FakeDevice(held=True)
    answers = {}

    async def ask(client: Any, text: str) -> None:
        answers[text] = await embed(client, text)

    async with serve([device]) as client, anyio.create_task_group() as group:
        group.start_soon(ask, client, "first")
        await device.wait_issued()
        for text in ("a", POISON, "b"):
            group.start_soon(ask, client, text)
        await wait_until(lambda: client.service.batcher.statistics().num_queued == 3)
        device.release()
    assert {text: answer.status_code for text, answer in answers.items()} == {
        "first": 200,
        "a": 200,
        POISON: 500,
        "b": 200,
    }
    assert answers[POISON].json() == {"error": "the model failed on this input"}


async def test_large_requests_leave_room_for_small_ones() -> None:
    """However many requests of many texts come, one of few texts is taken, and has its turn before them."""
    device = FakeDevice(held=True)
    order: list[int] = []

    async def ask(client: Any, count: int) -> None:
        answer = await embed(client, *["x"] * count)
        assert answer.status_code == 200
        order.append(count)

    async with serve([device]) as client, anyio.create_task_group() as group:
        batcher = client.service.batcher
        group.start_soon(ask, client, 2)
        await device.wait_issued()
        for number in range(1, 4):
            group.start_soon(ask, client, 250)
            await wait_until(lambda number=number: batcher.statistics().num_queued == 250 * number)
        refused = await embed(client, *["x"] * 250)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "no room" in refused.json()["error"]
        assert client.service.tokenizer.statistics().num_done == 752  # refused before that
        assert batcher.statistics().num_refused == 250
        assert (await client.get("/readyz")).status_code == 200
        group.start_soon(ask, client, 1)
        await wait_until(lambda: batcher.statistics().num_queued == 751)
        device.release()
    assert order[:2] == [2, 1]
    assert sorted(order[2:]) == [250, 250, 250]


async def test_a_full_queue_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the queue full, `/readyz` is 503 and small requests get 429, both with the time to come back."""
    monkeypatch.setattr(example, "MAX_QUEUE", 2)
    device = FakeDevice(held=True)
    async with serve([device]) as client, anyio.create_task_group() as group:
        group.start_soon(embed, client, "a")
        await device.wait_issued()
        for number in (1, 2):
            group.start_soon(embed, client, "a")
            await wait_until(lambda number=number: client.service.batcher.statistics().num_queued == number)
        for answer in (await client.get("/readyz"), await embed(client, "a")):
            assert answer.status_code in (503, 429)
            assert int(answer.headers["Retry-After"]) >= 1
        assert (await client.get("/healthz")).status_code == 200
        device.release()
    assert client.service.batcher.statistics().num_done == 3


async def test_a_client_that_leaves_cancels_its_texts() -> None:
    """Once its client is gone a request gives up its places in the queue, and the rest goes on."""
    device = FakeDevice(held=True)
    left = anyio.Event()
    statuses: list[int] = []
    bodies = [json.dumps({"texts": ["a"] * 5}).encode()]

    async def receive() -> dict[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def ask_and_leave(service: Any) -> None:
        statuses.append(await status_of(service, receive))

    async with serve([device]) as client, anyio.create_task_group() as group:
        batcher = client.service.batcher
        group.start_soon(embed, client, "stays")
        await device.wait_issued()
        group.start_soon(ask_and_leave, client.service)
        await wait_until(lambda: batcher.statistics().num_queued == 5)
        left.set()
        await wait_until(lambda: batcher.statistics().num_queued == 0)
        assert batcher.statistics().num_cancelled == 5
        device.release()
    assert batcher.statistics().num_done == 1
    assert statuses == [499]


async def test_time_is_one_for_tokenizer_and_model() -> None:
    """A request whose texts are not tokenized in time gets 504, and nothing of it reaches the model."""
    latch = Latch()

    def preprocess(texts: Sequence[str]) -> list[list[int]]:
        latch.hold()
        return tokenize(texts)

    async with serve(timeout=0.05, preprocess=preprocess) as client:
        answer = await embed(client, "late")
        assert answer.status_code == 504
        latch.open()
        await wait_until(lambda: client.service.tokenizer.statistics().num_running == 0)
        assert client.service.tokenizer.statistics().num_timed_out == 1
        assert client.service.batcher.statistics().num_batches == 0


async def test_suspect_and_lost_lanes_are_told(clock: Clock) -> None:
    """A lane that hangs is named, while others are used; without any lane the service is not live."""
    devices = fake_devices(2)
    async with serve(devices, hang_timeout=0.05) as client, anyio.create_task_group() as group:
        service = client.service
        assert (await client.get("/healthz")).json()["healthy"]
        group.start_soon(embed, client, HANGS)
        await service.model.latch.wait_entered()
        clock.advance(1.0)
        await wait_until(lambda: service.batcher.statistics().num_suspect == 1)
        answer = await client.get("/healthz")
        assert answer.status_code == 200
        told = answer.json()
        assert (told["live"], told["healthy"]) == (True, False)
        [(name, task)] = told["suspect"].items()
        assert told["lanes"][name] == "suspect"
        assert task["seconds"] == pytest.approx(1.0, abs=0.1)
        assert (await client.get("/readyz")).status_code == 200
        assert (await embed(client, "a")).status_code == 200
        other = next(position for position in (0, 1) if service.engine.lanes[position].name != name)
        devices[other].lose()
        assert (await embed(client, "a")).status_code == 503
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 503
        service.model.latch.open()
    assert service.batcher.statistics().num_done == 2


async def test_the_end_does_not_wait_for_what_hangs() -> None:
    """With a lane that hangs the service still ends; the request was answered when its time was over."""
    with anyio.fail_after(PATIENCE):
        async with serve(timeout=0.1, hang_timeout=0.05) as client:
            assert (await embed(client, HANGS)).status_code == 504
            assert (await embed(client, "a")).status_code == 504  # nothing else can run it
    assert "closed" in repr(client.service.batcher)
    client.service.model.latch.open()


async def test_both_batchers_are_exported() -> None:
    """Prometheus sees the tokenizer's calls beside the model's."""
    async with serve() as client:
        await embed(client, "a", "b", "c")
        text = (await client.get("/metrics")).text
    counts = [line for line in text.splitlines() if "done_total" in line and not line.startswith("#")]
    assert [line.split()[-1] for line in counts] == ["3.0", "3.0"]
    assert any("tokenizer" in line for line in counts)


async def test_statistics_are_json() -> None:
    """What the page shows comes as JSON: load and durations of both batchers, and the lanes."""
    async with serve() as client:
        await embed(client, "a", POISON)
        told = (await client.get("/statistics")).json()
    assert told["tokenizer"]["num_done"] == 2
    assert told["batcher"]["failures"] == {"ValueError": 1}
    assert told["batcher"]["run"]["p99"] > 0
    assert [lane["state"] for lane in told["lanes"]] == ["open"]
