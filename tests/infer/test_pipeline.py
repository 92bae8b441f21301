"""The pipeline by itself, on an engine that does as the test says; and the planning of batches."""

from __future__ import annotations

import anyio
import pytest
from fake_engine import FakeEngine, options
from hypothesis import given
from hypothesis import strategies as st

from asyncdp.errors import AsyncDPError, RecordError
from asyncdp.infer.batching import cut_windows, padding, plan_batches
from asyncdp.infer.job import blocks_of_part
from asyncdp.infer.pipeline import Pipeline
from asyncdp.infer.records import Records
from asyncdp.infer.report.monitor import Monitor
from asyncdp.infer.steps import EachValue, Steps, default_collate, length_of, same

STEPS = Steps(EachValue(same), default_collate, same, length_of)
OPTIONS = options(batch_size=2, shard_size=8)
SKIPPING = options(batch_size=2, shard_size=8, on_error="skip")


def records(count):
    """As a reader gives them: three at a time."""
    every = range(count)
    whole = Records(every, every, [[float(index)] for index in every], [f"row {index}" for index in every])
    return (whole.between(start, start + 3) for start in range(0, count, 3))


def windows(count, block_size=8, window=4):
    return cut_windows(records(count), block_size=block_size, window=window, wanted=lambda block: True)


def pipeline(engine, written, chosen=OPTIONS):
    def write(index, num_records, rows, failures):
        written[index] = (num_records, sorted(rows.finish()[0]), failures)

    return Pipeline(engine, STEPS, chosen, write, Monitor())


@pytest.mark.anyio
async def test_a_stuck_lane_stops_the_reading():
    """While no batch ends, only a few windows are read, however long the input: memory stays flat."""
    release, all_stuck, read, stuck = anyio.Event(), anyio.Event(), [], []

    class Stuck(FakeEngine):
        async def on_one_lane(self, *args, **kwargs):
            stuck.append(args)
            if len(stuck) == 4:
                all_stuck.set()
            await release.wait()
            return await super().on_one_lane(*args, **kwargs)

    def counted():
        for window in windows(400):
            read.append(window)
            yield window

    written: dict[int, object] = {}
    async with anyio.create_task_group() as group:
        group.start_soon(pipeline(Stuck(lambda x: x), written).run, counted())
        await all_stuck.wait()
        await anyio.wait_all_tasks_blocked()
        assert 0 < len(read) < 12
        release.set()
    assert sum(count for count, _, _ in written.values()) == 400


@pytest.mark.anyio
async def test_every_position_is_written_once():
    """Blocks hold exactly their own records, the last one the rest."""
    written: dict[int, object] = {}
    await pipeline(FakeEngine(lambda x: x * 2), written).run(windows(21))
    assert {index: positions for index, (_, positions, _) in written.items()} == {
        0: list(range(8)),
        1: list(range(8, 16)),
        2: list(range(16, 21)),
    }


@pytest.mark.anyio
async def test_a_lost_lane_is_no_bad_record():
    """Errors of the engine itself fail the job at once, whatever is done about bad records."""

    class Lost(FakeEngine):
        async def on_one_lane(self, *args, **kwargs):
            raise AsyncDPError("the lane is closed")

    with pytest.raises(AsyncDPError, match="lane is closed"):
        await pipeline(Lost(None), {}, SKIPPING).run(windows(8))


@pytest.mark.anyio
async def test_the_first_failure_is_raised_itself():
    """No exception group, and the model's own exception is the cause."""

    def refuse(x):
        raise ZeroDivisionError("no")

    with pytest.raises(RecordError) as caught:
        await pipeline(FakeEngine(refuse), {}).run(windows(40))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@given(
    st.lists(st.integers(0, 300), max_size=80), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 900))
)
def test_plans_hold_every_item_once_within_limits(costs, max_records, max_cost):
    """Every item is in one batch; no batch is too large, but for single items that are."""
    plan = plan_batches(costs, max_records, max_cost)
    assert sorted(index for batch in plan for index in batch) == list(range(len(costs)))
    for batch in plan:
        assert len(batch) <= max_records
        longest = max(costs[index] for index in batch)
        assert max_cost is None or len(batch) == 1 or longest * len(batch) <= max_cost


def test_batches_pad_little():
    """Items of like length go together, and a batch ends early rather than pad."""
    plan = plan_batches([10, 100] * 32, 16, None)
    assert sum(padding([[10, 100][index % 2] for index in batch]) for batch in plan) == 0


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_parts_cover_the_input_once(count, block_size, window, num_parts, contiguous):
    """Over all parts every record is in one window of its own block, and the counts add up."""
    seen = []
    for part in range(num_parts):
        sizes = {"block_size": block_size, "window": window}
        blocks = blocks_of_part(count, block_size, (part, num_parts), contiguous=contiguous)
        cut = list(cut_windows(records(count), **sizes, wanted=lambda b, blocks=blocks: b in blocks))
        own = [(record.position, window.block) for window in cut for record in window.records]
        assert sum(window.block_size or 0 for window in cut) == len(own)
        seen += own
    assert sorted(seen) == [(index, index // block_size) for index in range(count)]
