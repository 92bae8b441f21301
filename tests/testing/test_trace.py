"""Tracing: what is recorded, what it says, and that it goes away."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest
import torch
from torch import nn

from asyncdp import DataParallel, Runtime, TraceRecorder
from asyncdp._devices.fake import fake_devices
from asyncdp._runtime import trace
from asyncdp.errors import TraceFileError
from asyncdp.trace_summary import summarize

pytestmark = pytest.mark.anyio


async def spans_of(path: Path) -> list[dict[str, object]]:
    loaded = json.loads(await anyio.Path(path).read_text())
    return [event for event in loaded["traceEvents"] if event["ph"] == "X"]


async def test_every_stage_of_a_pass_is_recorded(tmp_path: Path) -> None:
    """A pass shows its shards running on their lanes, then its gather, each with its wait before."""
    path = tmp_path / "trace.json"
    async with DataParallel(nn.Linear(2, 2), "cpu*2", num_lanes="all") as engine:
        await engine(torch.zeros(4, 2))
        async with TraceRecorder(path):
            await engine(torch.zeros(4, 2))
        await engine(torch.zeros(4, 2))
    spans = await spans_of(path)
    on_lane = [(span["name"], span["args"]["lane"]) for span in spans if span["cat"] == "on lane"]  # type: ignore[index]
    assert sorted(on_lane)[1:] == [("run", "cpu:0"), ("run", "cpu:1")]
    assert sorted(on_lane)[0][0] == "gather"
    assert {span["args"]["pass"] for span in spans} == {0}  # type: ignore[index]
    assert sum(span["cat"] == "queued" for span in spans) == 3
    assert trace.recorder is None


async def test_device_time_is_told_apart(tmp_path: Path) -> None:
    """Time that a device takes after the call has returned is a span of its own."""
    path = tmp_path / "trace.json"
    devices = fake_devices(1)
    async with Runtime(devices) as runtime, TraceRecorder(path) as recorder:
        await runtime.run(torch.zeros, 1)
        devices[0].hold()
        async with anyio.create_task_group() as group:
            group.start_soon(runtime.run, torch.zeros, 1)
            await devices[0].wait_issued(2)
            devices[0].release()
        assert "recording" in repr(recorder)
    kinds = [span["cat"] for span in await spans_of(path)]
    assert [kinds.count(kind) for kind in ("queued", "on lane", "on device")] == [2, 2, 2]


async def test_summary_tells_lanes_and_works(tmp_path: Path) -> None:
    """The summary has one line per lane and kind of work, with counts."""
    path = tmp_path / "trace.json"
    async with Runtime("cpu") as runtime, TraceRecorder(path):
        for _ in range(3):
            await runtime.run(torch.zeros, 1)
    told = await runtime_free(path)
    assert "3 passes" in told
    assert any(line.split()[:3] == ["cpu:0", "zeros", "3"] for line in told.splitlines())
    assert any("zeros (queued)" in line for line in told.splitlines())


async def runtime_free(path: Path) -> str:
    return await anyio.to_thread.run_sync(summarize, path)


async def test_events_are_bounded(tmp_path: Path) -> None:
    """Beyond `max_events` spans are counted, not kept."""
    async with Runtime("cpu") as runtime, TraceRecorder(tmp_path / "t.json", max_events=2) as recorder:
        for _ in range(3):
            await runtime.run(torch.zeros, 1)
    assert recorder.num_dropped == 4


async def test_one_recorder_at_a_time(tmp_path: Path) -> None:
    """A second recorder is refused, and does not disturb the first."""
    async with TraceRecorder(tmp_path / "a.json") as first:
        with pytest.raises(RuntimeError, match="is active"):
            await TraceRecorder(tmp_path / "b.json").__aenter__()
        assert trace.recorder is first


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A file that is no trace is refused with its name."""
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(TraceFileError, match=r"x\.json"):
        summarize(path)
    path.write_text('{"traceEvents": []}')
    assert "no works" in summarize(path)
