"""Jobs from Python: inside of a running event loop, watched, cancelled, resumed."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading

import anyio
import pyarrow.dataset
import pytest

import asyncdp
from asyncdp.errors import JobUsageError, OutputExistsError, RecordError
from asyncdp.infer import Finished, InferOptions, Progress, ShardFinished, Started, Summary, Warned
from asyncdp.infer.report import memory
from asyncdp.infer.report.memory import heap_set_aside

OPTIONS = {"model": "models_for_tests:Sums", "output": "out", "column": "x", "devices": "cpu*2"}


@pytest.fixture
def path(numbers):
    """A file of forty records."""
    return numbers(40)


@pytest.fixture
def options(path, work):
    """The options of a job over that file."""
    return InferOptions((str(path),), "models_for_tests:Sums", work / "out", columns=("x",))


@pytest.fixture
def folder(work, numbers):
    """One with forty records, and a file that no reader takes."""
    folder = work / "folder"
    folder.mkdir()
    numbers(40, name="folder/in.jsonl")
    (folder / "notes.md").write_text("x")
    return folder


def ids(name="out"):
    return pyarrow.dataset.dataset(name, format="parquet").to_table()["id"].to_pylist()


@pytest.mark.anyio
async def test_run_returns_the_summary(path, capfd):
    """A whole job by keywords; nothing is printed, and signals stay as they were."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    summary = await asyncdp.infer.run(path, **OPTIONS)
    assert isinstance(summary, Summary)
    assert (summary.num_records, summary.num_bad) == (40, 0)
    assert ids() == list(range(40))
    assert capfd.readouterr() == ("", "")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.anyio
async def test_options_may_be_an_object(options):
    """`InferOptions` say all, and keywords change some of them."""
    await asyncdp.infer.run(options, devices="cpu")
    with pytest.raises(OutputExistsError):
        await asyncdp.infer.run(options)
    assert (await asyncdp.infer.run(options, resume=True)).num_earlier == 40


@pytest.mark.anyio
async def test_mistakes_are_raised_as_they_are(path):
    """No group of exceptions is around them, and an unknown option is told before anything runs."""
    with pytest.raises(JobUsageError, match=r"mean column\?"):
        await asyncdp.infer.run(path, **OPTIONS, colum="x")
    with pytest.raises(RecordError, match="Record 13"):
        await asyncdp.infer.run(path, **{**OPTIONS, "model": "models_for_tests:Picky"})
    plan = await asyncdp.infer.plan(path, **{**OPTIONS, "output": "other"})
    assert plan.num_tried == 32


@pytest.mark.anyio
async def test_events_tell_the_whole_job(folder):
    """They begin with the lanes, tell every shard, and end with the summary."""
    async with asyncdp.infer.start(folder, **OPTIONS, shard_size=16) as job:
        events = [event async for event in job.events()]
    assert events[0] == Started(None, 0, ("cpu:0", "cpu:1"))
    assert sorted(event.index for event in events if isinstance(event, ShardFinished)) == [0, 1, 2]
    assert any(isinstance(event, Warned) and ".md" in event.text for event in events)
    assert [event.num_done for event in events if isinstance(event, Progress)][-1] == 40
    assert events[-1] == Finished(job.summary)


@pytest.mark.anyio
async def test_nobody_needs_to_watch(path):
    """The end of the block waits for the job."""
    async with asyncdp.infer.start(path, **OPTIONS) as job:
        pass
    assert job.summary.num_records == 40
    assert isinstance([event async for event in job.events()][-1], Finished)


@pytest.mark.anyio
async def test_a_failure_ends_the_block(path):
    """The failure is raised at the end of the block, whose waiting it cancels."""
    with pytest.raises(RecordError):
        async with asyncdp.infer.start(path, **{**OPTIONS, "model": "models_for_tests:Picky"}):
            await anyio.sleep_forever()


@pytest.mark.anyio
async def test_an_exception_of_the_block_stops_the_job(path):
    """It comes out as it is, even where it is a group."""
    with pytest.raises(ExceptionGroup, match="two"):
        async with asyncdp.infer.start(path, **OPTIONS):
            raise ExceptionGroup("two", [ValueError("one"), ValueError("two")])


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["cancel()", "cancelled", "left"])
async def test_a_stopped_job_goes_on_with_nothing_lost(path, way):
    """However it is stopped in its midst, a resumed one has every record once."""
    options = {**OPTIONS, "shard_size": 4, "batch_size": 2, "window": 4}
    with anyio.CancelScope() as scope:
        try:
            async with asyncdp.infer.start(path, **options) as job:
                async for event in job.events():
                    if isinstance(event, ShardFinished) and way == "left":
                        raise KeyError
                    if isinstance(event, ShardFinished):
                        job.cancel() if way == "cancel()" else scope.cancel()
        except KeyError:
            pass
    assert job.summary is None
    summary = await asyncdp.infer.run(path, **options, resume=True)
    assert summary.num_records == 40
    assert summary.num_earlier >= 4
    assert ids() == list(range(40))


def test_a_cancelled_asyncio_task_leaves_no_thread_behind(path, monkeypatch):
    """`task.cancel()` while a shard is written: the task ends when it is, so that a resume meets nobody."""
    from asyncdp.infer.output.output import OutputFolder

    writing, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    write_block = OutputFolder.write_block

    def write_slowly(*args):
        writing.set()
        go_on.wait(20)
        write_block(*args)
        ended.set()

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(OutputFolder, "write_block", write_slowly)
            task = asyncio.create_task(asyncdp.infer.run(path, **OPTIONS))
            await asyncio.to_thread(writing.wait, 20)
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0)
            assert not task.done()
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ended.is_set()
        return await asyncdp.infer.run(path, **OPTIONS, resume=True)

    assert asyncio.run(main()).num_records == 40
    assert ids() == list(range(40))


def test_the_collector_passes_over_what_was_there(monkeypatch):
    """Objects from before a job are set aside while it runs, and no longer; frozen ones stay as they are."""
    monkeypatch.setattr(memory, "_freezes_itself", False)
    gc.unfreeze()
    try:
        with heap_set_aside():
            assert gc.get_freeze_count() > 1000
        assert gc.get_freeze_count() == 0
        gc.freeze()
        for _ in range(2):
            before = gc.get_freeze_count()
            with heap_set_aside():
                assert gc.get_freeze_count() == before
            assert gc.get_freeze_count() == before
    finally:
        gc.freeze()
