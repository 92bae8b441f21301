"""What runs in an actor of a cluster, and what it is told, without a cluster."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import socket
import sys
from types import SimpleNamespace

import anyio
import pytest

from asyncdp.errors import JobUsageError, MissingExtraError
from asyncdp.infer import InferOptions, read_config
from asyncdp.infer.cluster.actor import JobActor
from asyncdp.infer.cluster.messages import Counts, PackedError, Setup, versions
from asyncdp.infer.cluster.placing import Node, parse_resources, place
from asyncdp.infer.cluster.ray_cluster import connected
from asyncdp.infer.cluster.suspect import Work
from asyncdp.infer.cluster.tally import Tally
from asyncdp.infer.config import make_options
from asyncdp.infer.output.journal import Block
from asyncdp.infer.readers import Selection, open_inputs
from asyncdp.infer.readers.pieces import Planner, Reading
from asyncdp.infer.report.monitor import Monitor


@pytest.fixture
def parts(work, numbers):
    """Options of a job with four blocks, its pieces, and what an actor needs."""
    source = numbers(16, bad=(6,))
    out = work / "out"
    out.mkdir()
    (out / "token").touch()
    options = InferOptions(
        (str(source),), "models_for_tests:Sums", out, columns=("x",), devices="cpu*2", on_error="record",
        shard_size=4, window=4, batch_size=2, output_format="jsonl", ray="auto",
    )  # fmt: skip
    inputs = open_inputs(options.inputs, None, Selection(("x",)))
    pieces = dict(Planner(inputs, 4, lambda block: True).pieces())
    reading = Reading("jsonl", Selection(("x",)), inputs.files[0].dialect, None)
    setup = Setup(options, reading, str(work), tuple(sys.path), versions())
    return SimpleNamespace(options=options, pieces=pieces, setup=setup, out=out, source=source)


async def served(parts, works, setup=None):
    """Return what an actor makes of some works, one after the other, and what it counts."""
    actor = JobActor(setup or parts.setup)
    opened = await actor.open()
    if isinstance(opened, PackedError):
        return opened, None
    async with anyio.create_task_group() as group:
        group.start_soon(actor.serve, parts.out / "token", parts.source)
        found = [await actor.run(work, parts.pieces[work.block]) for work in works]
        actor.close()
    return found, await actor.counts()


def rows_of(parts, name):
    return [json.loads(line)["id"] for line in (parts.out / name).read_text().splitlines()]


def test_an_actor_writes_blocks_and_tries_parts_of_them(parts):
    """A whole block is written, one that is tried is not, and records that are refused count as bad."""
    works = [
        Work(2),
        Work(1),
        Work(0, alone=True, probed=(0, 2)),
        Work(3, alone=True, refused=(1,), batch_size=1),
    ]
    found, counts = anyio.run(served, parts, works)
    assert [block and (block.index, block.num_records, block.num_bad) for block in found] == [
        (2, 4, 0),
        (1, 4, 1),
        None,
        (3, 4, 1),
    ]
    assert rows_of(parts, "part-000001.jsonl") == [4, 5, 7]
    assert rows_of(parts, "part-000003.jsonl") == [12, 14, 15]
    assert "ProcessEndedError" in (parts.out / "_errors-000003.jsonl").read_text()
    assert not (parts.out / "part-000000.jsonl").exists()
    assert (counts.num_done, counts.num_bad, len(counts.lane_seconds)) == (12, 2, 2)


@pytest.mark.parametrize("change", ["version", "model", "folder"])
def test_a_node_that_differs_says_so(parts, change):
    """Another version, a model that is not there, and a folder that is not shared are told with a remedy."""
    if change == "version":
        other = dataclasses.replace(parts.setup, versions={"torch": "0.1"})
        packed, _ = anyio.run(served, parts, [], other)
        remedy = "same versions"
    elif change == "model":
        options = dataclasses.replace(parts.options, model="models_for_tests:Nothing")
        packed, _ = anyio.run(served, parts, [], dataclasses.replace(parts.setup, options=options))
        remedy = "Check the name"
    else:
        actor = JobActor(parts.setup)
        packed = anyio.run(actor.serve, parts.out / "other token", parts.source)
        remedy = "all nodes share"
    error = pickle.loads(pickle.dumps(packed)).unpack("a")
    assert isinstance(error, JobUsageError)
    assert str(error).startswith("On node a: ")
    assert remedy in str(error)


def nodes(*resources):
    return [Node(str(index), f"node{index}", dict(each)) for index, each in enumerate(resources)]


def places(slots):
    return [(int(slot.node.id), dict(slot.resources)) for slot in slots]


def test_every_node_gets_an_actor_with_all_that_it_has():
    """Nodes without processors get none, and where there are GPUs the others get none."""
    assert places(place(nodes({"CPU": 8}, {"CPU": 0, "memory": 5}, {"CPU": 2}))) == [
        (0, {"CPU": 8}),
        (2, {"CPU": 2}),
    ]
    mixed = nodes({"CPU": 8}, {"CPU": 16, "GPU": 4})
    assert places(place(mixed)) == [(1, {"CPU": 16, "GPU": 4})]
    assert places(place(mixed, on_gpus=False)) == [(0, {"CPU": 8}), (1, {"CPU": 16})]


def test_a_number_of_actors_shares_the_nodes():
    """Actors go to the nodes by turns; with resources named, only where there is room for them."""
    assert places(place(nodes({"CPU": 8}, {"CPU": 4}), num_actors=3)) == [
        (0, {"CPU": 4}),
        (0, {"CPU": 4}),
        (1, {"CPU": 4}),
    ]
    slots = place(
        nodes({"CPU": 8, "GPU": 2}, {"CPU": 8}, {"CPU": 3, "GPU": 4}), resources={"CPU": 2, "GPU": 1}
    )
    assert [slot.node.id for slot in slots] == ["0", "2", "0"]
    assert place(nodes({"CPU": 1}), resources={"TPU": 1}) == []


@pytest.mark.parametrize("text", ["", "3", "[1]", "{}", '{"CPU": "two"}', '{"CPU": 0}', '{"GPU": true}'])
def test_resources_that_are_none_are_refused(text):
    """What is no object of positive numbers is an error that shows how to write it."""
    with pytest.raises(JobUsageError, match=re.escape('{"CPU": 8, "GPU": 1}')):
        parse_resources(text)


def test_a_tally_counts_what_is_lost_no_more():
    """Records of a block in the work count while their actor lives; finished ones for ever, and once."""
    tally = Tally(Monitor())
    tally.start(0, "a")
    tally.note(0, Counts(num_done=7, num_bad=1, num_batches=3, lane_seconds=(1.0, 3.0), stages={"read": 1.0}))
    tally.finish(0, Block(0, 4, 1, ()))
    tally.apply()
    assert (tally.monitor.num_done, tally.monitor.num_bad, tally.monitor.num_nodes) == (7, 1, 1)
    tally.end(0)
    tally.start(1, "a")
    tally.apply()
    assert (tally.monitor.num_done, tally.monitor.num_bad, tally.monitor.num_batches) == (4, 1, 3)
    assert tally.lanes == [("a", 2.0)]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"inputs": ("-",), "ray": "auto"}, "Standard input and --ray"),
        ({"ray": "ray://head:10001"}, "no address that a job can be started from"),
        ({"ray_actors": 2}, "--ray-actors has no effect without --ray"),
        ({"ray": "auto", "ray_actors": 0}, "--ray-actors is 0"),
        ({"ray": "auto", "where": "a > 1", "limit": 3}, "--limit beside --where"),
        ({"ray": "auto", "ray_resources": 3}, "ray_resources is 3"),
    ],
)
def test_what_cannot_run_on_a_cluster_is_refused(options, cause):
    """Before anything is read, with what to do instead."""
    with pytest.raises(JobUsageError, match=cause):
        make_options({"inputs": ("a.txt",), "model": "a:b", "output": "out", **options})


def test_options_of_the_cluster_are_options_like_others(tmp_path):
    """They may stand in a file, where resources are a table."""
    path = tmp_path / "job.toml"
    path.write_text('inputs = ["a"]\nmodel = "a:b"\noutput = "o"\nray = "auto"\nray_resources = {GPU = 1}\n')
    options = make_options(read_config(path))
    assert (options.ray, parse_resources(options.ray_resources)) == ("auto", {"GPU": 1})


def test_without_ray_the_error_names_the_extra(monkeypatch):
    """Whoever has not installed Ray learns how to."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'asyncdp\[ray\]'"), connected("auto"):
        pass


def test_where_nothing_listens_is_told_soon(free_address):
    """An address without a cluster is an error with the address, and none is started in its place."""
    pytest.importorskip("ray")
    with (
        pytest.raises(JobUsageError, match=f"There is no Ray cluster at {free_address}"),
        connected(free_address),
    ):
        pass


@pytest.fixture
def free_address():
    """An address that nothing listens at."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"
