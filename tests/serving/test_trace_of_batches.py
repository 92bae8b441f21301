"""Traces of a batcher: each batch with its size, padding and failure, its steps, and its wait."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import nn

from asyncdp import Batcher, DataParallel, Runtime, TraceRecorder
from asyncdp.cli.trace_summary import summarize

pytestmark = pytest.mark.anyio


class Sums(nn.Module):
    """Sums of rows; a negative number is an error."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if bool((rows < 0).any()):
            raise ValueError("negative")
        return rows.sum(1)


async def awaited(rows: torch.Tensor) -> torch.Tensor:
    return Sums()(rows)  # type: ignore[no-any-return]


@asynccontextmanager
async def serving(kind: str, **options: Any) -> AsyncIterator[Batcher]:
    async with Runtime("cpu") as runtime, DataParallel(Sums(), runtime=runtime) as engine:
        served: Any = {"engine": engine, "function": Sums(), "async": awaited}[kind]
        own = {} if kind == "engine" else {"runtime": runtime}
        async with Batcher(served, pad=0, **options, **own) as batcher:
            yield batcher


async def call_all(batcher: Batcher, samples: list[Any]) -> None:
    calls = [batcher.call_nowait(sample) for sample in samples]
    for call in calls:
        with suppress(ValueError):
            await call


async def spans_of(path: Path) -> list[dict[str, Any]]:
    loaded = json.loads(await anyio.Path(path).read_text())
    return [event for event in loaded["traceEvents"] if event["ph"] == "X"]


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("kind", ["engine", "function", "async"])
async def test_a_batch_shows_its_wait_its_steps_and_its_padding(
    kind: str, sized: bool, tmp_path: Path
) -> None:
    """Engines, functions and async functions alike: the batch, its wait before and three steps within it."""
    path = tmp_path / "trace.json"
    options = {"size_of": len, "max_padding": 1.0} if sized else {}
    async with serving(kind, name="sums", **options) as batcher, TraceRecorder(path):
        await call_all(batcher, [torch.ones(length) for length in (2, 5, 3)])
    spans = await spans_of(path)
    (batch,) = [span for span in spans if span["cat"] == "batch"]
    args = batch["args"]
    assert (args["size"], args["padding"], args["is_retry"]) == (3, 5, False)
    assert args["lane"] == "batcher sums"
    assert "error" not in args
    (wait,) = [span for span in spans if (span["name"], span["cat"]) == ("batch", "queued")]
    assert wait["ts"] + wait["dur"] == pytest.approx(batch["ts"], abs=0.002)
    for step in ("collate", "model", "split"):
        (span,) = [span for span in spans if span["name"] == step and span["cat"] != "queued"]
        assert batch["ts"] <= span["ts"]
        assert span["ts"] + span["dur"] <= batch["ts"] + batch["dur"] + 0.002
    assert "batcher sums" in await anyio.to_thread.run_sync(summarize, path)


@pytest.mark.parametrize("kind", ["engine", "function", "async"])
async def test_a_batch_that_raises_names_its_error(kind: str, tmp_path: Path) -> None:
    """The batch that raised and the part with the culprit carry the error's class, other parts none."""
    path = tmp_path / "trace.json"
    async with serving(kind) as batcher, TraceRecorder(path):
        await call_all(batcher, [torch.tensor([float(value)]) for value in (1, -1, 3, 4)])
    spans = await spans_of(path)
    batches = [span["args"] for span in spans if span["cat"] == "batch"]
    assert batches[0]["error"] == "ValueError"
    assert not batches[0]["is_retry"]
    assert any(args["is_retry"] and "error" in args for args in batches)
    assert any("error" not in args for args in batches)
    if kind != "async":
        runs = [span["args"] for span in spans if (span["name"], span["cat"]) == ("run", "on lane")]
        assert sum("error" in args for args in runs) == sum("error" in args for args in batches)


@pytest.mark.parametrize("kind", ["engine", "function", "async"])
async def test_padding_is_found_where_batches_are_made(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a trace is recorded, too, each batch is padded once, and not on the event loop."""
    threads: list[threading.Thread] = []

    def noted(*args: Any) -> torch.Tensor:
        threads.append(threading.current_thread())
        return new_full(*args)

    new_full = torch.Tensor.new_full  # what a padded batch is made by
    monkeypatch.setattr(torch.Tensor, "new_full", noted)
    path = tmp_path / "trace.json"
    async with serving(kind) as batcher, TraceRecorder(path):
        await call_all(batcher, [torch.ones(length) for length in (2, 5, 3)])
        await call_all(batcher, [torch.ones(length) for length in (4, 1)])
        assert batcher.statistics().padding_tokens == 5 + 3
    found = [span["args"]["padding"] for span in await spans_of(path) if span["cat"] == "batch"]
    assert found == [5, 3]
    assert len(threads) == 2
    assert threading.current_thread() not in threads


async def test_padding_that_nobody_knows_is_left_out(tmp_path: Path) -> None:
    """Without `size_of`, a collate of the user's and samples that fit no batch give no figure."""
    path = tmp_path / "trace.json"
    async with Runtime("cpu") as runtime:
        own = Batcher(lambda rows: rows, collate=torch.stack, runtime=runtime)
        unlike = Batcher(lambda rows: rows, pad=0, runtime=runtime)
        async with own, unlike, TraceRecorder(path):
            await call_all(own, [torch.ones(2), torch.ones(2)])
            await call_all(unlike, [torch.ones(2), (torch.ones(2),)])  # each runs by itself
    batches = [span["args"] for span in await spans_of(path) if span["cat"] == "batch"]
    assert all("padding" not in args for args in batches if args["size"] == 2)
