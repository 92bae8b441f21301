"""Tracing: what is recorded, what it says, and that it goes away."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import nn

from asyncdp import Batcher, DataParallel, Runtime, TraceRecorder
from asyncdp._devices import cuda_clock
from asyncdp._devices.fake import fake_devices
from asyncdp._runtime import trace
from asyncdp.errors import TraceFileError
from asyncdp.trace_summary import summarize
from tests.cuda_stub import CudaStub, cuda_stub

__all__ = ["cuda_stub"]

pytestmark = pytest.mark.anyio


async def spans_of(path: Path) -> list[dict[str, Any]]:
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
    on_lane = [(span["name"], span["args"]["lane"]) for span in spans if span["cat"] == "on lane"]
    assert sorted(on_lane)[1:] == [("run", "cpu:0"), ("run", "cpu:1")]
    assert sorted(on_lane)[0][0] == "gather"
    assert {span["args"]["pass"] for span in spans} == {0}
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


def timed(spans: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Begin and end of the spans by the device's clock, in milliseconds after the first one's begin."""
    times = [(span["ts"], span["ts"] + span["dur"]) for span in spans if span["cat"] == "device time"]
    return [(round((begin - times[0][0]) / 1e3), round((end - times[0][0]) / 1e3)) for begin, end in times]


async def test_cuda_works_are_timed_by_the_device(cuda_stub: CudaStub, tmp_path: Path) -> None:
    """A work's span by the device's clock begins when its stream gets to it and ends with its last kernel."""
    path = tmp_path / "trace.json"
    cuda_stub.kernel(5.0)  # the caller's, which the first work has to wait for
    begun = time.perf_counter()
    async with Runtime([cuda_stub.lane()]) as runtime, TraceRecorder(path):
        for seconds in (0.25, 0.0, 0.5):
            await runtime.run(cuda_stub.kernel, seconds)
    spans = await spans_of(path)
    assert timed(spans) == [(0, 250), (250, 250), (250, 750)]
    assert {span["args"]["lane"] for span in spans if span["cat"] == "device time"} == {"cpu:0"}
    first = next(span for span in spans if span["cat"] == "device time")
    # The trace begins at 0: five seconds of waiting, and what the host took.
    assert 5e6 <= first["ts"] <= 5e6 + (time.perf_counter() - begun) * 1e6
    assert "kernel (device time)" in await runtime_free(path)


async def test_device_rows_do_not_overlap_when_the_clocks_drift(
    cuda_stub: CudaStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks are compared anew once a second, on the lane; no span begins before an earlier one ends."""
    monkeypatch.setattr(cuda_clock, "_MAX_AGE_SECONDS", 0.0)
    path = tmp_path / "trace.json"
    async with Runtime([cuda_stub.lane()]) as runtime, TraceRecorder(path):
        # The virtual device is quicker than the host, so the second span maps into the first one.
        await runtime.run(cuda_stub.kernel, 100.0)
        await runtime.run(cuda_stub.kernel, 200.0)
    first, second = timed(await spans_of(path))
    assert first == (0, 100_000)
    assert second[0] == 100_000
    assert threading.current_thread() not in cuda_stub.timed_by
    assert len(cuda_stub.timed_by) == 6


async def test_nothing_is_timed_without_a_recorder(cuda_stub: CudaStub, tmp_path: Path) -> None:
    """Off, tracing makes no timed events; on, the clocks are compared once and each work has two events."""
    async with Runtime([cuda_stub.lane()]) as runtime:
        await runtime.run(cuda_stub.kernel, 1.0)
        assert cuda_stub.timed_by == []
        async with TraceRecorder(tmp_path / "trace.json"):
            await runtime.run(cuda_stub.kernel, 1.0)
            await runtime.run(cuda_stub.kernel, 1.0)
        assert len(cuda_stub.timed_by) == 5
        await runtime.run(cuda_stub.kernel, 1.0)
    assert len(cuda_stub.timed_by) == 5


async def test_failed_works_have_no_device_time(cuda_stub: CudaStub, tmp_path: Path) -> None:
    """A work that raises, and a device that is lost, leave the trace and the lane whole."""

    def lose() -> None:
        cuda_stub.lost = True

    path = tmp_path / "trace.json"
    async with Runtime([cuda_stub.lane()]) as runtime, TraceRecorder(path):
        with pytest.raises(ZeroDivisionError):
            await runtime.run(divmod, 1, 0)
        await runtime.run(cuda_stub.kernel, 1.0)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            await runtime.run(lose)
        assert runtime.statistics().lanes[0].num_done == 3
    spans = await spans_of(path)
    assert [span["name"] for span in spans if span["cat"] == "device time"] == ["kernel"]
    assert sum(span["cat"] == "on lane" for span in spans) == 3


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


async def test_works_are_named_for_what_they_do(tmp_path: Path) -> None:
    """The package's own works have the names of the documentation, a user's function its own."""

    def apply() -> None:
        pass

    path = tmp_path / "trace.json"
    module = nn.Linear(2, 2)
    async with DataParallel(module, "cpu*2") as engine, Batcher(engine) as batcher, TraceRecorder(path):
        await engine.runtime.run(apply)
        await batcher(torch.zeros(2))
        async for _ in engine.map([torch.zeros(1, 2)]):
            pass
        await engine.runtime.warm_up()
    spans = await spans_of(path)
    assert {span["name"] for span in spans} == {"apply", "run", "warm_up"}


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
