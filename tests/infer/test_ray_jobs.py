"""Jobs over a Ray cluster: the same output as on one machine, whatever ends meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path

import anyio
import pytest

import asyncdp
from asyncdp.errors import JobUsageError, TooManyBadRecordsError
from asyncdp.infer import Progress, ShardFinished, Started

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.timeout(240),
    # Ray leaves its log files, sockets and processes to the end of the interpreter.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SHAPE = {"columns": ("x",), "window": 8, "batch_size": 4, "on_error": "record"}


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one node with two processors, whose processes find the models of the tests."""
    folders = [Path(asyncdp.__file__).parents[1], Path(__file__).parent]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        # One of its own, whatever else runs on this machine.
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture
def run_here(work):
    """Run a job on this machine, into the folder `here`, and return its summary."""

    def run(inputs, model="models_for_tests:Sums", **options):
        options = {"output": work / "here", "devices": "cpu*2", "shard_size": 16, **SHAPE, **options}
        return anyio.run(lambda: asyncdp.infer.run(str(inputs), model=model, **options))

    return run


@pytest.fixture
def run_there(run_here, work, cluster):
    """Run a job on the cluster, into the folder `there`, and return its summary."""

    def run(inputs, model="models_for_tests:Sums", **options):
        return run_here(
            inputs, model, **{"output": work / "there", "devices": None, "ray": "auto", **options}
        )

    return run


def contents(folder):
    names = ("part-", "_errors-", ".tmp-")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(names)}


def test_the_output_is_that_of_one_machine(run_here, run_there, numbers, work):
    """Every file is the same byte for byte, and a run on one machine can write again what got lost."""
    source = numbers(150, bad=(3, 77))
    here, there = run_here(source), run_there(source)
    assert contents(work / "here") == contents(work / "there")
    assert (there.num_records, there.num_bad, there.files) == (here.num_records, here.num_bad, here.files)
    before = contents(work / "there")
    (work / "there" / "part-000004.parquet").unlink()
    assert run_here(source, output=work / "there", resume=True).num_earlier == 134
    assert contents(work / "there") == before


def test_a_record_that_ends_its_process_is_one_bad_record(run_there, numbers, work):
    """A crash in native code costs its own record alone, and the job goes on in new processes."""
    summary = run_there(numbers(6), model="models_for_tests:Deadly", shard_size=1)
    assert (summary.num_records, summary.num_bad) == (6, 1)
    (line,) = (work / "there" / "_errors-000004.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert failure["position"] == 4
    assert failure["error"].startswith("ProcessEndedError")


def test_a_cancelled_job_is_continued(run_here, numbers, work, cluster):
    """What was finished before a cancellation is kept, what was not is done by a resume, here or there."""
    source, seen = numbers(24), []
    options = {"output": work / "there", "ray": "auto", "ray_resources": {"CPU": 2}, "shard_size": 4, **SHAPE}

    async def cancel_soon():
        async with asyncdp.infer.start(str(source), model="models_for_tests:Slow", **options) as job:
            async for event in job.events():
                seen.append(event)
                if isinstance(event, ShardFinished):
                    job.cancel()

    anyio.run(cancel_soon, backend="trio")
    names = [event.lanes for event in seen if isinstance(event, Started)]
    assert names == [(ray.nodes()[0]["NodeManagerAddress"],)]
    assert all(event.nodes == 1 for event in seen if isinstance(event, Progress))
    summary = run_here(
        source, model="models_for_tests:Slow", output=work / "there", shard_size=4, resume=True
    )
    assert 0 < summary.num_earlier < summary.num_records == 24
    ids = pytest.importorskip("pyarrow.dataset").dataset(work / "there", format="parquet").to_table()["id"]
    assert sorted(ids.to_pylist()) == list(range(24))
    assert not [name for name in contents(work / "there") if name.startswith(".tmp-")]


def test_too_many_bad_records_end_the_job(run_there, numbers, work):
    """The limit counts over all actors; bad records of unfinished shards are kept for a look."""
    with pytest.raises(TooManyBadRecordsError, match="more than the 2 allowed"):
        run_there(numbers(40, bad=(1, 2, 5)), max_errors=2)
    positions = [
        json.loads(line)["position"]
        for path in (work / "there").glob("_errors-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert sorted(positions) == [1, 2, 5]


def test_a_mistake_is_told_before_any_record_runs(run_there, numbers, work, cluster):
    """A model that the nodes cannot load, and another cluster than the one in use, end the job at once."""
    with pytest.raises(JobUsageError, match=r"On node .*importing nowhere failed"):
        run_there(numbers(4), model="nowhere:Model")
    with pytest.raises(JobUsageError, match="connected to another cluster"):
        run_there(numbers(4), ray="10.255.255.1:6379")
    assert not (work / "there").exists()
