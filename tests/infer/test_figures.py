"""What a job reports about itself: time by stage, load of the lanes, padding."""

from __future__ import annotations

import itertools
import threading
import time

import anyio
import pytest
import torch
from fake_engine import FakeEngine, options

from asyncdp.infer.batching import cut_windows
from asyncdp.infer.pipeline import Pipeline
from asyncdp.infer.records import Records
from asyncdp.infer.report import monitor as monitor_module
from asyncdp.infer.report.monitor import Monitor, Sample
from asyncdp.infer.report.plot import lane_loads
from asyncdp.infer.steps import EachValue, Steps, default_collate, length_of, same

STEPS = Steps(EachValue(same), default_collate, same, length_of)


def run_pipeline(engine, monitor, steps=STEPS, values=((1.0,),) * 8, batch_size=2):
    chosen = options(batch_size=batch_size, shard_size=8)
    pipeline = Pipeline(engine, steps, chosen, lambda *_: None, monitor)
    every = range(len(values))
    records = Records(every, every, values, [""] * len(values))
    windows = cut_windows([records], block_size=8, window=8, wanted=lambda block: True)
    anyio.run(pipeline.run, windows)


def test_time_on_the_lanes_excludes_waiting():
    """The stage "lanes" is what the lanes were busy, however long batches waited behind each other."""
    monitor = Monitor()

    class Ticking(FakeEngine):
        def _run(self, args, kwargs):
            self.busy += 0.5  # as if every batch took half a second
            return args[0]

    engine = Ticking(None, num_lanes=1)
    engine.busy = 3.0  # something ran on this lane before the job
    monitor.restart(engine)
    run_pipeline(engine, monitor)
    monitor.sample(engine)
    stages = monitor.stage_seconds()
    assert stages["lanes"] == pytest.approx(2.0)
    assert list(stages) == ["read", "preprocess", "collate", "lanes", "postprocess", "write"]


def test_nothing_ran_nothing_is_reported():
    """A job that found everything done has no stages to report."""
    assert Monitor().stage_seconds() == {}


def test_no_time_is_lost_between_threads(monkeypatch):
    """Stages timed by several threads at once add up to all of their time."""

    class Interrupted(dict):
        def get(self, *args):
            value = super().get(*args)
            time.sleep(0)  # lets another thread in
            return value

    clock = threading.local()

    def tick():
        clock.now = getattr(clock, "now", 0) + 1
        return clock.now

    monitor = Monitor(stages=Interrupted())
    monkeypatch.setattr(monitor_module.time, "perf_counter", tick)

    def count():
        for _ in range(300):
            with monitor.timed("collate"):
                pass

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.stages["collate"] == 1200


def spans(busy):
    samples = [Sample(index / 2, 0, {"a": seconds}) for index, seconds in enumerate(busy)]
    return list(itertools.pairwise(samples))


def test_a_long_task_loads_all_the_time_it_took():
    """A lane counts a task when it ends; the picture shows it over the spans in which it ran."""
    assert lane_loads(spans([0.0, 0.0, 0.0, 0.0, 2.0]), "a") == [1.0, 1.0, 1.0, 1.0]
    assert lane_loads(spans([1.0, 1.0, 1.0, 2.0, 2.25]), "a") == [0.0, 1.0, 1.0, 0.5]
    assert lane_loads(spans([0.0, 0.25, 0.5]), "a") == [0.5, 0.5]
    assert lane_loads([], "a") == []


@pytest.mark.parametrize(
    ("values", "collate", "expected"),
    [
        (["a", "four"], default_collate, 0),
        ([[1.0], [2.0]], default_collate, 0),
        (["a", "four"], lambda texts: torch.zeros(len(texts), max(map(len, texts))), 3),
    ],
)
def test_padding_is_reported_where_something_pads(values, collate, expected):
    """Lists of texts and stacked arrays hold no padding; a collate of one's own may pad."""
    monitor = Monitor()
    steps = Steps(EachValue(same), collate, same, length_of)
    run_pipeline(FakeEngine(lambda batch: torch.zeros(len(batch))), monitor, steps, values, 8)
    assert (monitor.padding, monitor.num_done) == (expected, 2)
