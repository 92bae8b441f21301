"""One contender of bench_serving, in a process and virtual environment of its own.

    python serving_contender.py NAME MODEL_FOLDER

Reads rounds as lines of JSON from standard input: {"clients": n, "texts": [...]}; answers each by a
line with seconds, latencies and the event loop's stalls. Every client sends its next text when the
last one was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

Call = Callable[..., Awaitable[object]]
MAX_BATCH_SIZE = 32
BEAT_SECONDS = 0.002


@contextlib.asynccontextmanager
async def open_asyncdp(folder: str) -> AsyncIterator[Call]:
    from asyncdp import Batcher, DataParallel, Runtime
    from asyncdp.infer.model.embed import embed_steps, load_embedder

    model, steps = load_embedder(Path(folder))[0].eval(), embed_steps(Path(folder))

    def collate(samples):
        arguments = steps.collate(list(samples))
        return arguments["input_ids"], arguments.get("attention_mask")

    options = {
        "collate": collate,
        "split": lambda output, _: output["embedding"].unbind(),
        "size_of": len,
        "max_padding": 1.0,  # nothing is computed for it
    }

    def split(tokens, _):
        return tokens

    async with (
        DataParallel(model, "cpu*2") as engine,
        Batcher(engine, max_batch_size=MAX_BATCH_SIZE, **options) as batcher,
        # Texts become tokens in batches too, on a lane of their own: on the loop all would wait for it.
        Runtime("cpu") as runtime,
        Batcher(steps.preprocess, collate=list, split=split, runtime=runtime) as tokenizer,
    ):

        async def call(text):
            return await batcher(await tokenizer(text))

        yield call


@contextlib.asynccontextmanager
async def open_infinity(folder: str) -> AsyncIterator[Call]:
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(
            model_name_or_path=folder,
            engine="torch",
            device="cpu",
            batch_size=MAX_BATCH_SIZE,
            bettertransformer=False,
            compile=False,
        )
    )
    await engine.astart()
    yield lambda text: engine.embed(sentences=[text])
    await engine.astop()


@contextlib.asynccontextmanager
async def open_http(command: list[str], port: int) -> AsyncIterator[Call]:
    """Start a service over HTTP in a process of its own; its client here is as thin as can be."""
    server = subprocess.Popen(  # noqa: ASYNC220  before anything is measured
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call(text: str) -> object:
        while free:
            # The server may have closed a connection that was idle while others had their turn.
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                return await call_over(free.pop(), text)
        return await call_over(await asyncio.open_connection("127.0.0.1", port), text)

    async def call_over(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], text: str) -> object:
        reader, writer = connection
        body = json.dumps({"texts": [text]}).encode()
        head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        content = await reader.readexactly(length)
        free.append(connection)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        return json.loads(content)["vectors"][0]

    try:
        for _ in range(240):
            with contextlib.suppress(OSError, AssertionError, asyncio.IncompleteReadError):
                await call("are you there?")
                break
            await asyncio.sleep(0.5)
        else:
            raise SystemExit("the server did not come up")
        yield call
    finally:
        server.terminate()
        server.wait()


@contextlib.asynccontextmanager
async def open_encode(folder: str) -> AsyncIterator[Call]:
    """Embed all texts at once, on this thread: what one would do without a service."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")

    async def call(texts: str | list[str]) -> object:
        return model.encode(texts, batch_size=MAX_BATCH_SIZE)

    yield call


@contextlib.asynccontextmanager
async def open_threads(folder: str) -> AsyncIterator[Call]:
    """Embed all texts, sorted by length, on a thread for each core: what two cores can give."""
    import torch

    from asyncdp.infer.model.embed import embed_steps, load_embedder

    model, steps = load_embedder(Path(folder))[0].eval(), embed_steps(Path(folder))

    def embed(batches: list[object]) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while batches:
                model(**steps.collate(batches.pop()))

    async def call(texts: str | list[str]) -> object:
        samples = sorted(steps.preprocess(texts if isinstance(texts, list) else [texts]), key=len)
        batches = [
            samples[start : start + MAX_BATCH_SIZE] for start in range(0, len(samples), MAX_BATCH_SIZE)
        ]
        return await asyncio.gather(*[asyncio.to_thread(embed, batches) for _ in range(2)])

    yield call


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def open_contender(name: str, folder: str) -> contextlib.AbstractAsyncContextManager[Call]:
    port = free_port()
    if name == "asyncdp":
        return open_asyncdp(folder)
    if name == "infinity":
        return open_infinity(folder)
    if name == "encode":
        return open_encode(folder)
    if name == "threads":
        return open_threads(folder)
    if name == "asyncdp-http":
        example = Path(__file__).parents[1] / "docs" / "examples" / "embedding_service.py"
        command = [sys.executable, str(example), folder, "--port", str(port), "--devices", "cpu*2"]
        return open_http(command, port)
    server = str(Path(__file__).with_name("serving_litserve.py"))
    return open_http([sys.executable, server, folder, str(port), str(MAX_BATCH_SIZE)], port)


async def run_round(call: Call, num_clients: int, texts: list[str] | list[list[str]]) -> dict[str, float]:
    rest, latencies, stalls = iter(texts), [], []

    async def client() -> None:
        for text in rest:
            started = time.perf_counter()
            await call(text)
            latencies.append(time.perf_counter() - started)

    async def beat() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(BEAT_SECONDS)
            stalls.append(time.perf_counter() - started - BEAT_SECONDS)

    heart = asyncio.create_task(beat())
    started = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(num_clients)])
    seconds = time.perf_counter() - started
    heart.cancel()
    latencies.sort()
    stalls.sort()
    return {
        "seconds": seconds,
        "p50": latencies[len(latencies) // 2],
        "p99": latencies[int(len(latencies) * 0.99)],
        "stall_p99": stalls[int(len(stalls) * 0.99)] if stalls else seconds,
    }


async def main() -> None:
    loop = asyncio.get_running_loop()
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    async with open_contender(sys.argv[1], sys.argv[2]) as call:
        await call("warm")
        print(json.dumps("ready"), file=answers, flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            request = json.loads(line)
            texts = [request["texts"]] if sys.argv[1] in ("encode", "threads") else request["texts"]
            answer = await run_round(call, request["clients"], texts)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
