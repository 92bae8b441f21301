"""What a replica of the example for Ray Serve does, without Serve around it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

pytest.importorskip("ray.data")
pytest.importorskip("starlette")
from starlette.requests import Request

from asyncdp.errors import NoLaneWorksError

example: Any = importlib.import_module("ray_serve")


def request(body: bytes) -> Request:
    """Make a request as Serve hands it over."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # that of Serve
async def test_a_replica_answers_until_it_is_ended(
    encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts get their vectors, other bodies a 400 with the reason; ended, it is ill."""
    end = example.Texts.__del__
    monkeypatch.delattr(example.Texts, "__del__")  # Python itself would not await it
    replica = await anyio.to_thread.run_sync(example.Texts, str(encoder_folder))
    await replica.check_health()
    answer = await replica(request(json.dumps({"texts": ["one two", "three"]}).encode()))
    assert answer.status_code == 200
    assert [len(row["embedding"]) for row in json.loads(answer.body)["rows"]] == [8, 8]
    for body in (b"", b"no json", b'{"texts": "one"}', b'{"texts": []}', b'{"texts": [1]}', b'"\xff"'):
        assert (await replica(request(body))).status_code == 400
    await end(replica)
    with pytest.raises(NoLaneWorksError):
        await replica.check_health()
