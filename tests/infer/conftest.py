"""A tiny model, its inputs, and a job runner, shared by the tests of batch inference."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import anyio
import pytest

from asyncdp.infer import InferOptions, Job

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder with an importable module of models and functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return tmp_path


@pytest.fixture
def numbers(work):
    """Write `count` records {"x": [i, 1, 0]} as JSONL and return the file."""

    def make(count=10, bad=(), name="numbers.jsonl"):
        path = work / name
        with open(path, "w") as file:
            for index in range(count):
                entry = "not json" if index in bad else json.dumps({"x": [float(index), 1.0, 0.0]})
                file.write(entry + "\n")
        return path

    return make


@pytest.fixture
def run(work, request):
    """Run a job over `inputs` into the folder `out` and return its summary.

    Tests that are about more than what is read and written have it run on both event loops, by the fixture
    `anyio_backend`; elsewhere trio would only go the same way through the files again.
    """
    is_on_both = "anyio_backend" in request.fixturenames
    backend = request.getfixturevalue("anyio_backend") if is_on_both else "asyncio"

    def run(inputs, model="models_for_tests:Sums", monitor=None, **options):
        options = {"columns": ("x",), "devices": "cpu*2", "output": work / "out", **options}
        inputs = inputs if isinstance(inputs, tuple) else (str(inputs),)
        job = Job(InferOptions(inputs=inputs, model=model, **options))
        return anyio.run(job.run, None, monitor, backend=backend)

    return run


@pytest.fixture(scope="session")
def s3_server():
    """A server on this machine that speaks as S3 does, which the environment names; gives its driver."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield s3fs.S3FileSystem
    server.stop()


@pytest.fixture
def s3(s3_server, never_block_the_loop):
    """The URL of a bucket on that server."""
    for function in never_block_the_loop.functions.values():
        function.can_block_in(
            "fsspec/asyn.py", {"_runner", "_run_coro"}
        )  # a loop of its own, in a thread of its own
    s3_server().makedirs("bucket", exist_ok=True)
    return "s3://bucket"
