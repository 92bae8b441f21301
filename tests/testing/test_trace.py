"""Tracing: what is recorded, what its summary says, and that nothing is recorded afterwards."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import torch._dynamo  # an optimizer imports it at first use, which reads files: not on an event loop
from torch import nn
from typer.testing import CliRunner

import asyncdp
from asyncdp import Batcher, DataParallel, Runtime, TraceRecorder
from asyncdp.cli.app import app
from asyncdp.cli.trace_summary import summarize
from asyncdp.errors import TraceFileError
from asyncdp.testing import fake_devices
from tests.cuda_stub import CudaStub, cuda_stub

__all__ = ["cuda_stub"]

pytestmark = pytest.mark.anyio

_DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
_LISTED = re.search(r"row with the \w+ it ran: (.*?), or the name of", _DOCUMENT, re.S)
STAGES = set(re.findall(r"`(\w+)`", _LISTED.group(1) if _LISTED else ""))


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


async def test_scattering_is_a_span_on_each_lane(tmp_path: Path) -> None:
    """A lane that copies its shard to its device shows that within its run; others copy nothing."""
    path = tmp_path / "trace.json"
    module = nn.Linear(2, 2)
    data = torch.zeros(4, 2), torch.zeros(4, 2)
    async with (
        Runtime(fake_devices(2)) as runtime,
        DataParallel(module, runtime=runtime) as engine,
        TraceRecorder(path),
    ):
        await engine.on_one_lane(data[0])
        await engine.train_step(*data, nn.functional.mse_loss, torch.optim.SGD(module.parameters()))
    async with (
        DataParallel(module, "cpu*2", num_lanes="all") as engine,
        TraceRecorder(tmp_path / "none.json"),
    ):
        await engine(data[0])
    spans = [span for span in await spans_of(path) if span["cat"] == "on lane"]
    for outer in ("run", "train"):
        for whole in (span for span in spans if span["name"] == outer):
            inner = [
                span
                for span in spans
                if span["name"] == "scatter" and span["args"] == whole["args"] and span["tid"] == whole["tid"]
            ]
            assert len(inner) == 1
            for span in inner:
                assert whole["ts"] <= span["ts"]
                assert span["ts"] + span["dur"] <= whole["ts"] + whole["dur"]
    assert {span["args"]["lane"] for span in spans if span["name"] == "scatter"} == {"cpu:0", "cpu:1"}
    assert "scatter" not in {span["name"] for span in await spans_of(tmp_path / "none.json")}


async def test_spans_of_a_row_nest_or_follow_each_other(tmp_path: Path) -> None:
    """Viewers drop spans of one row that overlap in part: tasks that wait together have several rows."""
    path = tmp_path / "trace.json"
    devices = fake_devices(2)
    entered, latch = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        assert latch.wait(30)

    async with Runtime(devices) as runtime, TraceRecorder(path):
        devices[0].hold()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: runtime.run(block, lane=runtime.lanes[0]))
            await anyio.to_thread.run_sync(entered.wait)
            for _ in range(5):
                group.start_soon(lambda: runtime.run(int, lane=runtime.lanes[0]))
                await runtime.run(int, lane=runtime.lanes[1])
            latch.set()
            await devices[0].wait_issued(6)
            devices[0].release()
    loaded = json.loads(await anyio.Path(path).read_text())
    rows = {event["tid"]: event["args"]["name"] for event in loaded["traceEvents"] if event["ph"] == "M"}
    assert len(set(rows.values())) == len(rows)
    assert {"cpu:0", "cpu:0 queued", "cpu:0 queued 2", "cpu:0 on device 2", "cpu:1"} <= set(rows.values())
    spans = await spans_of(path)
    assert {span["tid"] for span in spans} == set(rows)
    for row in rows:
        ends: list[float] = []
        own = [(span["ts"], span["dur"]) for span in spans if span["tid"] == row]
        for begin, seconds in sorted(own, key=lambda each: (each[0], -each[1])):
            assert seconds >= 0
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or begin + seconds <= ends[-1] + 0.002  # rounded to nanoseconds
            ends.append(begin + seconds)


async def test_device_time_is_a_span_of_its_own(tmp_path: Path) -> None:
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


async def test_cuda_tasks_are_timed_by_the_device(cuda_stub: CudaStub, tmp_path: Path) -> None:
    """A task's span by the device's clock begins when its stream gets to it and ends with its last kernel."""
    path = tmp_path / "trace.json"
    cuda_stub.kernel(5.0)  # the caller's, which the first task has to wait for
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
    assert "kernel (device time)" in await summary_of(path)


async def test_device_rows_do_not_overlap_when_the_clocks_drift(
    cuda_stub: CudaStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks are compared anew once a second, on the lane; no span begins before an earlier one ends."""
    cuda_stub.compare_clocks_always(monkeypatch)
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
    """Off, tracing makes no timed events; on, the clocks are compared once and each task has two events."""
    async with Runtime([cuda_stub.lane()]) as runtime:
        await runtime.run(cuda_stub.kernel, 1.0)
        assert cuda_stub.timed_by == []
        async with TraceRecorder(tmp_path / "trace.json"):
            await runtime.run(cuda_stub.kernel, 1.0)
            await runtime.run(cuda_stub.kernel, 1.0)
        assert len(cuda_stub.timed_by) == 5
        await runtime.run(cuda_stub.kernel, 1.0)
    assert len(cuda_stub.timed_by) == 5


async def test_failed_tasks_have_no_device_time(cuda_stub: CudaStub, tmp_path: Path) -> None:
    """A task that raises, and a device that is lost, leave the trace and the lane usable."""

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


async def test_summary_lists_lanes_and_tasks(tmp_path: Path) -> None:
    """The summary has one line per lane and kind of task, with counts."""
    path = tmp_path / "trace.json"
    async with Runtime("cpu") as runtime, TraceRecorder(path):
        for _ in range(3):
            await runtime.run(torch.zeros, 1)
    summary = await summary_of(path)
    assert "3 passes" in summary
    assert any(line.split()[:3] == ["cpu:0", "zeros", "3"] for line in summary.splitlines())
    assert any("zeros (queued)" in line for line in summary.splitlines())


async def summary_of(path: Path) -> str:
    return await anyio.to_thread.run_sync(summarize, path)


async def test_tasks_are_named_for_what_they_do(tmp_path: Path) -> None:
    """The package's own tasks have the names of the documentation, a user's function its own name."""

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
    batches = {"batch", "collate", "model", "split"}
    assert {span["name"] for span in spans} == {"apply", "run", "warm_up"} | batches


async def functional(num_lanes: int) -> None:
    await asyncdp.data_parallel(nn.Linear(2, 2), torch.zeros(4, 2), f"cpu*{num_lanes}")


async def call(num_lanes: int | str) -> None:
    async with DataParallel(nn.Linear(2, 2), "cpu*2", num_lanes=num_lanes) as engine:
        for _ in range(8):  # "auto" tries one lane and all of them
            await engine(torch.zeros(4, 2))


async def call_alone(_: object) -> None:
    async with DataParallel(nn.Linear(2, 2), "cpu") as engine:
        await engine(torch.zeros(4, 2))


async def whole(_: object) -> None:
    async with DataParallel(nn.Linear(2, 2), "cpu*2") as engine:
        await engine.on_one_lane(torch.zeros(4, 2))


async def stream(_: object) -> None:
    async with DataParallel(nn.Linear(2, 2), "cpu*2") as engine:
        assert len([result async for result in engine.map([torch.zeros(1, 2)])]) == 1


async def batches_of_an_engine(_: object) -> None:
    async with DataParallel(nn.Linear(2, 2), "cpu*2") as engine, Batcher(engine) as batcher:
        await batcher(torch.zeros(2))


async def batches_of_a_function(_: object) -> None:
    async with Batcher(torch.neg) as batcher:
        await batcher(torch.zeros(2))


async def batches_of_an_async_function(_: object) -> None:
    async def function(batch: torch.Tensor) -> torch.Tensor:
        return batch

    async with Batcher(function) as batcher:
        await batcher(torch.zeros(2))


async def train(num_lanes: int | str) -> None:
    module = nn.Linear(2, 2)
    async with DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:
        optimizer = torch.optim.SGD(module.parameters())
        data = torch.zeros(4, 2), torch.zeros(4, 2)
        await engine.train_step(*data, nn.functional.mse_loss, optimizer)
        with engine.no_sync():
            await engine.train_step(*data, nn.functional.mse_loss, optimizer)


async def verbs(_: object) -> None:
    module = nn.Linear(2, 2)
    outputs = await asyncdp.parallel_apply(asyncdp.replicate(module, "cpu*2"), [torch.zeros(4, 2)] * 2)
    await asyncdp.backward([output.sum() for output in outputs])


async def warm_up(_: object) -> None:
    async with Runtime("cpu") as runtime:
        await runtime.warm_up()


@pytest.mark.parametrize(
    ("way", "argument", "expected"),
    [
        (functional, 1, {"run"}),
        (functional, 2, {"replicate", "run", "gather"}),
        (call, "auto", {"run"}),
        (call, "all", {"run", "gather"}),
        (call, 1, {"run"}),
        (call_alone, None, {"run"}),
        (whole, None, {"run"}),
        (stream, None, {"run"}),
        (batches_of_an_engine, None, {"run", "batch", "collate", "model", "split"}),
        (batches_of_a_function, None, {"run", "batch", "collate", "model", "split"}),
        (batches_of_an_async_function, None, {"batch", "collate", "model", "split"}),
        (train, "all", {"train", "reduce"}),
        (train, 1, {"train"}),
        (verbs, None, {"run", "backward"}),
        (warm_up, None, {"warm_up"}),
    ],
)
async def test_every_way_of_a_pass_has_known_names(
    way: Callable[[Any], Awaitable[None]], argument: object, expected: set[str], tmp_path: Path
) -> None:
    """Whatever starts a pass, its tasks have the names that the documentation lists, and no others."""
    path = tmp_path / "trace.json"
    async with TraceRecorder(path):
        await way(argument)
    found = {span["name"] for span in await spans_of(path)}
    assert expected <= found
    assert found <= STAGES


async def test_a_users_function_keeps_its_name_whatever_it_is(tmp_path: Path) -> None:
    """Functions called `run`, partial functions and callable objects keep their own names."""

    def run(_: object) -> None:
        pass

    class Tokenizer:
        def __call__(self) -> None:
            pass

    path = tmp_path / "trace.json"
    async with Runtime("cpu") as runtime, TraceRecorder(path):
        for args in ((run, 3), (partial(run, 3),), (Tokenizer(),)):
            await runtime.run(*args)
    names = [span["name"] for span in await spans_of(path) if span["cat"] == "on lane"]
    assert names == ["run", "run", "Tokenizer"]


async def test_a_file_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    """A path in no existing folder is rejected before anything is recorded, and another may be given."""
    with pytest.raises(FileNotFoundError):
        await TraceRecorder(tmp_path / "nowhere" / "trace.json").__aenter__()
    async with TraceRecorder(tmp_path / "trace.json"):
        pass


async def test_tasks_that_never_began_are_forgotten(tmp_path: Path) -> None:
    """A recorder that has written its file keeps no task alive, not even one that was cancelled."""
    device = fake_devices(1)[0]
    device.hold()
    latch = threading.Event()
    async with (
        Runtime([device]) as runtime,
        TraceRecorder(tmp_path / "trace.json") as recorder,
        anyio.create_task_group() as group,
    ):
        group.start_soon(runtime.run, latch.wait)
        group.start_soon(runtime.run, int)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
        latch.set()
        device.release()
    assert not recorder._queued
    assert not recorder._issued


async def test_events_are_bounded(tmp_path: Path) -> None:
    """Beyond `max_events` spans are counted, not kept."""
    async with Runtime("cpu") as runtime, TraceRecorder(tmp_path / "t.json", max_events=2) as recorder:
        for _ in range(3):
            await runtime.run(torch.zeros, 1)
    assert recorder.num_dropped == 4
    summary = await summary_of(tmp_path / "t.json")
    assert "4 more spans were dropped" in summary
    assert "max_events" in summary


async def test_dropped_events_are_mentioned_only_if_there_are_any(tmp_path: Path) -> None:
    """The summary of a complete trace does not mention dropped spans."""
    async with Runtime("cpu") as runtime, TraceRecorder(tmp_path / "t.json"):
        await runtime.run(torch.zeros, 1)
    assert "spans were dropped" not in await summary_of(tmp_path / "t.json")


async def test_one_recorder_at_a_time(tmp_path: Path) -> None:
    """A second recorder is rejected and does not disturb the first, which records on."""
    async with Runtime("cpu") as runtime, TraceRecorder(tmp_path / "a.json"):
        with pytest.raises(RuntimeError, match="is active"):
            await TraceRecorder(tmp_path / "b.json").__aenter__()
        await runtime.run(torch.zeros, 1)
    assert {span["name"] for span in await spans_of(tmp_path / "a.json")} == {"zeros"}


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A file that is no trace is rejected with its name."""
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(TraceFileError, match=r"x\.json"):
        summarize(path)
    path.write_text('{"traceEvents": []}')
    assert "no tasks" in summarize(path)


async def test_the_command_line_shows_the_summary(tmp_path: Path) -> None:
    """`asyncdp trace summary FILE` prints it, and rejects any other file in one line."""
    path = tmp_path / "trace.json"
    async with Runtime("cpu") as runtime, TraceRecorder(path):
        await runtime.run(torch.zeros, 1)

    def show(file: Path) -> Any:
        return CliRunner().invoke(app, ["trace", "summary", str(file)])

    shown = await anyio.to_thread.run_sync(show, path)
    assert shown.exit_code == 0
    assert shown.stdout.strip() == await summary_of(path)
    refused = await anyio.to_thread.run_sync(show, tmp_path / "nothing.json")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: cannot read ")
    assert "Traceback" not in refused.output
