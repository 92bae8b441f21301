"""A batch that raises: culprits are found in few runs, a model that is down costs few, neighbours go on."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch

from asyncdp import Batcher, Runtime
from asyncdp.errors import DeviceLostError
from asyncdp.testing import fake_devices

pytestmark = pytest.mark.anyio


class Model:
    """Counts its runs; negative samples are bad, and all are while it is down."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.is_down = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if self.is_down:
            raise ConnectionError("down")
        if (x < 0).any():
            raise ValueError("negative")
        return x * 2


async def outcomes_of(batcher: Batcher, values: list[float]) -> list[Any]:
    """The results of calls in one batch, or the types of their errors."""
    outcomes: list[Any] = []
    for call in [batcher.call_nowait(torch.tensor(float(value))) for value in values]:
        try:
            outcomes.append((await call).item())
        except Exception as error:
            outcomes.append(type(error))
    return outcomes


def expected(values: list[float]) -> list[Any]:
    return [ValueError if value < 0 else 2.0 * value for value in values]


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("num_samples", [2, 3, 8, 32])
@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
async def test_one_bad_sample_costs_few_runs(is_warm: bool, num_samples: int, place: float) -> None:
    """Wherever the bad sample is, it is found by halving, and all others get their results."""
    model = Model()
    values = [float(n) for n in range(num_samples)]
    values[int((num_samples - 1) * place)] = -1.0
    async with Runtime("cpu") as runtime, Batcher(model, runtime=runtime) as batcher:
        if is_warm:
            await batcher(torch.tensor(1.0))
            model.sizes.clear()
        assert await outcomes_of(batcher, values) == expected(values)
        stats = batcher.statistics()
        assert (stats.num_failed, stats.num_retried, stats.num_running) == (1, 1, 0)
    assert len(model.sizes) <= 3 + 2 * num_samples.bit_length()


async def test_a_sample_counts_once_however_often_it_runs() -> None:
    """What is left of a batch that raised runs in other batches, but is counted with the first alone."""
    model = Model()
    values = [-1.0 if n % 7 == 3 else float(n) for n in range(64)]
    async with Runtime("cpu") as runtime, Batcher(model, runtime=runtime, max_batch_size=16) as batcher:
        assert await outcomes_of(batcher, values) == expected(values)
        stats = batcher.statistics()
    assert sum(model.sizes) > 64
    assert stats.num_samples == stats.num_done + stats.num_failed == 64


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.05, 0.15])
async def test_many_bad_samples_hurt_nobody(seed: int, share: float) -> None:
    """However many samples of a batch are bad with one and the same error, the good ones are answered."""
    chance = random.Random(seed)
    values = [-1.0 if chance.random() < share else float(n) for n in range(64)]
    async with Runtime("cpu*2") as runtime, Batcher(Model(), runtime=runtime) as batcher:
        assert await outcomes_of(batcher, [1.0]) == [2.0]
        assert await outcomes_of(batcher, values) == expected(values)


async def test_a_model_that_is_down_costs_three_runs() -> None:
    """If whatever is run of a batch raises the same, the rest is not run; once the model is up all go on."""
    model = Model()
    model.is_down = True
    async with Runtime("cpu") as runtime, Batcher(model, runtime=runtime) as batcher:
        assert await outcomes_of(batcher, [1.0] * 32) == [ConnectionError] * 32
        assert model.sizes == [32, 1, 1]
        model.sizes.clear()
        assert await outcomes_of(batcher, [1.0] * 32) == [ConnectionError] * 32
        assert model.sizes == [32, 1]
        model.is_down = False
        assert await outcomes_of(batcher, [1.0, -1.0, 2.0]) == [2.0, ValueError, 4.0]
        model.is_down = True
        model.sizes.clear()
        assert await outcomes_of(batcher, [1.0] * 32) == [ConnectionError] * 32
        assert len(model.sizes) == 6  # it worked a moment ago: more has to fail before the model is blamed


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize(
    "text", ["out of memory: {} of 80 GiB free", "no answer at 0x7f{:x} after {} s", "request {}-a{} failed"]
)
async def test_errors_that_differ_in_numbers_are_the_same(text: str, is_warm: bool) -> None:
    """A model that is down is found out too if each run names another time, size, address or id."""
    sizes: list[int] = []

    def down(x: torch.Tensor) -> torch.Tensor:
        if is_warm and not sizes:
            sizes.append(len(x))
            return x
        sizes.append(len(x))
        raise ConnectionError(text.format(len(sizes), 7919 * len(sizes)))

    async with Runtime("cpu") as runtime, Batcher(down, runtime=runtime) as batcher:
        if is_warm:
            await batcher(torch.tensor(1.0))
        assert await outcomes_of(batcher, [1.0] * 32) == [ConnectionError] * 32
        assert len(sizes) <= (7 if is_warm else 3)


async def test_no_retry_fails_the_batch() -> None:
    """By `retry="none"` a batch that raises runs once, and all its calls get the error."""
    model = Model()
    async with Runtime("cpu") as runtime, Batcher(model, retry="none", runtime=runtime) as batcher:
        assert await outcomes_of(batcher, [1.0, -1.0, 2.0]) == [ValueError] * 3
        assert batcher.statistics().num_retried == 0
    assert model.sizes == [3]


def test_retry_is_checked() -> None:
    """Another word than the two is refused."""
    with pytest.raises(ValueError, match="retry"):
        Batcher(Model(), retry="twice")  # type: ignore[arg-type]


async def test_other_batches_run_between_the_parts() -> None:
    """On a single lane calls that came later need not wait until the culprit of a batch is found."""
    order: list[str] = []
    late: list[Any] = []

    def engine(x: torch.Tensor) -> torch.Tensor:
        order.append("late" if (x == 100).any() else "early")
        if (x < 0).any():
            raise ValueError("negative")
        return x

    async def call(value: float) -> None:
        late.append((await batcher(torch.tensor(value))).item())

    async with (
        Runtime("cpu") as runtime,
        Batcher(engine, max_batch_size=16, runtime=runtime) as batcher,
        anyio.create_task_group() as group,
    ):
        early = [batcher.call_nowait(torch.tensor(float(n or -1))) for n in range(16)]
        for _ in range(16):
            group.start_soon(call, 100.0)
        with pytest.raises(ValueError, match="negative"):
            await early[0]
        for each in early[1:]:
            await each
    assert late == [100.0] * 16
    assert order.index("late") <= 2


def mean_of_all(x: torch.Tensor) -> torch.Tensor:
    return x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("engine", "samples"),
    [
        (mean_of_all, [torch.ones(2)] * 12),
        (torch.relu, [torch.ones(2 + n % 2) for n in range(12)]),
        (lambda texts: texts, [torch.ones(1, dtype=(torch.float32, torch.int64)[n % 2]) for n in range(12)]),
    ],
)
async def test_batches_that_run_one_by_one_are_logged_once(
    engine: Callable[..., Any], samples: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Too few rows or unlike samples cost many runs: one warning says so, with the error that says why."""
    async with Runtime("cpu") as runtime, Batcher(engine, runtime=runtime) as batcher:
        for _ in range(3):
            with caplog.at_level(logging.WARNING, logger="asyncdp"):
                calls = [batcher.call_nowait(sample) for sample in samples]
                assert all([torch.is_tensor(await call) for call in calls])
    (record,) = caplog.records
    assert "each of its samples runs by itself" in record.getMessage()
    assert record.exc_info is not None
    assert "samples" in str(record.exc_info[1])


async def test_a_bad_sample_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged where a batch raised because of a sample."""
    async with Runtime("cpu") as runtime, Batcher(Model(), runtime=runtime) as batcher:
        await outcomes_of(batcher, [1.0, 2.0, -1.0, 3.0, 4.0])
    assert not caplog.records


async def test_a_lost_lane_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged where the bad sample of a batch ended with its lane, before it ran alone."""
    (device,) = fake_devices(1)
    model = Model()

    def engine(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 and x[0] < 0:
            device.lose()
            return x
        return model(x)

    async with Runtime([device]) as runtime, Batcher(engine, runtime=runtime) as batcher:
        await batcher(torch.tensor(3.0))
        assert await outcomes_of(batcher, [1.0, -1.0]) == [2.0, DeviceLostError]
    assert not caplog.records


async def test_a_part_that_times_out_or_is_cancelled_ends_the_search() -> None:
    """Calls that are given up while their batch runs in parts are not run, and nobody hangs."""
    calls: list[Any] = []
    sizes: list[int] = []

    async def engine(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        await anyio.lowlevel.checkpoint()
        if len(sizes) == 2:
            for call in calls[4:]:
                call.cancel()
        if (x < 0).any():
            raise ValueError("negative")
        return x

    async with Runtime("cpu") as runtime, Batcher(engine, runtime=runtime) as batcher:
        calls += [batcher.call_nowait(torch.tensor(float(n or -1))) for n in range(16)]
        with pytest.raises(ValueError, match="negative"):
            await calls[0]
        assert [(await call).item() for call in calls[1:4]] == [1.0, 2.0, 3.0]
    stats = batcher.statistics()
    assert (stats.num_done, stats.num_failed, stats.num_cancelled) == (3, 1, 12)
