"""`engine.train`: a stream of steps that are those of a plain loop, whatever goes wrong meanwhile."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import asyncdp
from asyncdp.errors import (
    ClosureOptimizerError,
    LengthMismatchError,
    LossNotScalarError,
    NotAnOptimizerError,
    NotAPairError,
    NotASchedulerError,
    RuntimeClosedError,
)
from asyncdp.testing.fake import fake_devices

from ..runtime.helpers import Latch
from .helpers import batch, distance, engine, mlp, same, serial_step, snapshot
from .test_options import pair, sgd

pytestmark = pytest.mark.anyio

Pairs = list[tuple[Tensor, Tensor]]


def batches(count: int, num_rows: int = 6) -> Pairs:
    return [batch(num_rows) for _ in range(count)]


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), 0.01)


def trained(module: nn.Module, pairs: Pairs, optimizer: Any = None) -> list[Tensor]:
    """Train in plain torch; return the losses."""
    optimizer = optimizer or sgd(module)
    return [serial_step(module, optimizer, x, y, cross_entropy) for x, y in pairs]


async def results(stream: asyncdp.StepStream) -> list[asyncdp.StepResult]:
    async with stream as steps:
        return [step async for step in steps]


async def take_all(stream: asyncdp.StepStream, taken: list[int]) -> None:
    """Note the numbers of all steps of which there are results."""
    async for step in stream:
        taken.append(step.index)  # noqa: PERF401  those before an error count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
async def test_one_lane_takes_the_steps_of_a_plain_loop(dtype: torch.dtype) -> None:
    """Weights, optimizer state and losses are a plain loop's to the last bit, in order."""
    module, serial = pair()
    module, serial = module.to(dtype), serial.to(dtype)
    pairs = [batch(count, dtype) for count in (6, 5, 6, 1, 7, 6)]
    optimizer, plain = adamw(module), adamw(serial)
    async with engine(module, 1) as one:
        steps = await results(one.train(pairs, cross_entropy, optimizer))
        assert one.statistics().num_steps == 6
    losses = trained(serial, pairs, plain)
    assert [step.index for step in steps] == [*range(6)]
    assert [step.rows for step in steps] == [6, 5, 6, 1, 7, 6]
    assert [step.learning_rate for step in steps] == [0.01] * 6
    assert same([step.loss for step in steps], losses)
    assert same(snapshot(module, optimizer)["optimizer"], plain.state_dict())
    assert same(module.state_dict(), serial.state_dict())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("num_lanes", [2, 3])
@pytest.mark.parametrize("max_ahead", [1, 2, 9])
async def test_lanes_take_the_steps_of_a_plain_loop(num_lanes: int, max_ahead: int) -> None:
    """Split over lanes they differ from it by rounding only, however many are queued."""
    module, serial = pair()
    pairs = [batch(count) for count in (7, 1, 6, 2, 9, 6, 6)]
    async with engine(module, num_lanes) as one:
        steps = await results(one.train(pairs, cross_entropy, adamw(module), max_ahead=max_ahead))
    losses = trained(serial, pairs, adamw(serial))
    assert distance(module, serial) < 1e-12
    assert same([step.loss for step in steps], losses, 1e-12)


async def test_the_number_of_lanes_may_be_learned_on_the_way() -> None:
    """With num_lanes="auto" steps change between one lane and several, and stay those of a plain loop."""
    module, serial = pair()
    pairs = batches(30)
    async with asyncdp.DataParallel(module, "cpu*2") as one:
        await results(one.train(pairs, cross_entropy, sgd(module)))
        (choice,) = one.statistics().choices
    assert choice.num_calls == 30
    assert choice.num_probes >= 12  # two turns of three on one lane, and on two
    trained(serial, pairs)
    assert distance(module, serial) < 1e-12


async def test_buffers_follow_step_by_step() -> None:
    """Running statistics of batch norm are those of a plain loop."""
    module: Any = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    serial = copy.deepcopy(module)
    pairs = batches(8)
    async with engine(module, 1) as one:
        await results(one.train(pairs, cross_entropy, sgd(module), max_ahead=4))
    trained(serial, pairs)
    assert same(module.state_dict(), serial.state_dict())


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_the_next_step_is_queued_while_one_runs(num_lanes: int) -> None:
    """No step waits for the event loop: all that are ahead run although the loop is blocked."""
    module, serial = pair()
    latch, done = Latch(), threading.Semaphore(0)
    pairs, taken = batches(4), list[int]()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        latch.hold()
        return cross_entropy(outputs, targets)

    async with engine(module, num_lanes) as one, anyio.create_task_group() as group:
        steps = one.train(pairs, loss_fn, sgd(module), before_step=done.release, max_ahead=3)
        group.start_soon(take_all, steps, taken)
        await latch.wait_entered()
        await anyio.wait_all_tasks_blocked()
        latch.open()
        for _ in range(3):  # blocks the loop, by no call that its guard knows
            while not done.acquire(blocking=False):
                pass
        assert taken == []
    assert taken == [0, 1, 2, 3]
    trained(serial, pairs)
    assert distance(module, serial) < 1e-12


@pytest.mark.parametrize("max_ahead", [1, 3])
async def test_back_pressure(max_ahead: int) -> None:
    """No more steps are begun, and batches read, than results were taken and may be ahead."""
    module, _ = pair()
    read: list[int] = []

    def source() -> Iterator[tuple[Tensor, Tensor]]:
        for index in itertools.count():
            read.append(index)
            yield batch(4)

    async with engine(module, 1) as one:
        async with one.train(source(), cross_entropy, sgd(module), max_ahead=max_ahead) as steps:
            for taken in range(1, 6):
                await anext(steps)
                await anyio.wait_all_tasks_blocked()
                assert taken <= len(read) <= taken + max_ahead
        assert one.statistics().num_steps <= 5 + max_ahead


async def test_nothing_runs_before_the_first_result_is_asked_for() -> None:
    """A stream that is made and closed reads nothing and trains nothing, and closes its source."""
    module, serial = pair()
    closed = []

    def source() -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield batch(4)
        finally:
            closed.append(True)

    begun = source()
    next(begun)
    async with engine(module, 2) as one:
        async with one.train(begun, cross_entropy, sgd(module)) as steps:
            pass
        with pytest.raises(StopAsyncIteration):
            await anext(steps)
    assert closed
    assert same(module.state_dict(), serial.state_dict())


class Failing:
    """What raises at its call number `at`, on any lane, and counts its calls."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0
        self.lock = threading.Lock()

    def __call__(self, *_: object) -> None:
        with self.lock:
            self.count += 1
            if self.count == self.at:
                raise KeyError("on purpose")


PLACES = ["forward", "loss", "backward", "before_step", "optimizer", "scheduler"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("max_ahead", [1, 4])
async def test_a_failing_step_ends_the_stream(place: str, num_lanes: int, max_ahead: int) -> None:
    """Steps before it are whole and their results are given; it changes nothing, and none follows."""
    module, serial = pair()
    optimizer = sgd(module)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    pairs = batches(8)
    per_step = num_lanes if place in ("forward", "loss", "backward") else 1
    fail = Failing(3 * per_step + 1)
    if place == "forward":
        module.register_forward_pre_hook(fail)
    elif place == "optimizer":
        optimizer.register_step_pre_hook(fail)
    elif place == "scheduler":
        step = schedule.step
        schedule.step = lambda: (fail(), step())  # type: ignore[method-assign]

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if place == "loss":
            fail()
        if place == "backward":
            outputs.register_hook(fail)
        return cross_entropy(outputs, targets)

    taken: list[int] = []
    async with engine(module, num_lanes) as one:
        steps = one.train(
            pairs,
            loss_fn,
            optimizer,
            scheduler=schedule,
            before_step=fail if place == "before_step" else None,
            max_ahead=max_ahead,
        )
        with pytest.raises(KeyError, match="on purpose") as caught:
            await take_all(steps, taken)
        assert taken == [0, 1, 2]
        with pytest.raises(StopAsyncIteration):
            await anext(steps)
        assert one.statistics().num_steps == 3 + (place == "scheduler")
        notes = " ".join(caught.value.__notes__)
        assert ("after a step that the optimizer has taken" in notes) == (place == "scheduler")
        trained(serial, pairs[: 3 + (place == "scheduler")])
        assert distance(module, serial) < 1e-12
        assert all(parameter.grad is None for parameter in module.parameters())
        fail.at = -1  # the engine goes on
        await results(one.train(pairs[:2], cross_entropy, optimizer))
    trained(serial, pairs[:2])
    assert distance(module, serial) < 1e-12


async def test_what_cannot_be_trained_on_comes_after_the_steps_before_it() -> None:
    """A batch that is no pair, or of unlike lengths, ends the stream in its place, and names itself."""
    good = batches(2)
    x, y = batch(4)
    bad: list[tuple[Any, type[Exception], str]] = [
        (x, NotAPairError, "batch 2 is a Tensor"),
        ((x, y, y), NotAPairError, "batch 2 is a tuple of 3"),
        ((x, y[:3]), LengthMismatchError, "inputs has 4 and targets has 3"),
    ]
    for each, kind, message in bad:
        module, serial = pair()
        taken: list[int] = []
        async with engine(module, 2) as one:
            with pytest.raises(kind, match=message):
                await take_all(one.train([*good, each, *good], cross_entropy, sgd(module)), taken)
        assert taken == [0, 1]
        trained(serial, good)
        assert distance(module, serial) < 1e-12


async def test_a_loss_that_is_no_number_is_refused() -> None:
    """The error of a step is the one that `train_step` gives."""
    module, serial = pair()
    async with engine(module, 1) as one:
        with pytest.raises(LossNotScalarError):
            await results(one.train(batches(2), lambda outputs, _: outputs, sgd(module)))
    assert same(module.state_dict(), serial.state_dict())


async def test_async_sources_and_sources_that_raise() -> None:
    """Any iterable will do; what it raises comes after the results of all batches before it."""
    pairs = batches(3)

    async def async_source() -> AsyncIterator[Any]:
        for each in pairs:
            await anyio.lowlevel.checkpoint()
            yield each
        raise OSError("no more")

    def source() -> Iterator[Any]:
        yield from pairs
        raise OSError("no more")

    makers: list[Callable[[], Any]] = [async_source, source]
    for make, num_lanes in itertools.product(makers, (1, 2)):
        module, serial = pair()
        taken: list[int] = []
        async with engine(module, num_lanes) as one:
            with pytest.raises(OSError, match="no more"):
                await take_all(one.train(make(), cross_entropy, sgd(module)), taken)
        assert taken == [0, 1, 2]
        trained(serial, pairs)
        assert distance(module, serial) < 1e-12


async def test_a_data_loader_is_a_source() -> None:
    """Batches as `DataLoader` gives them, lists of two, are pairs."""
    module, serial = pair()
    data = torch.utils.data.TensorDataset(*batch(10))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    async with engine(module, 2) as one:
        steps = await results(one.train(loader, cross_entropy, sgd(module)))
    assert [step.rows for step in steps] == [4, 4, 2]
    trained(serial, [tuple(each) for each in loader])
    assert distance(module, serial) < 1e-12


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("way", ["break", "aclose", "cancel", "drop"])
async def test_leaving_early_begins_no_further_step(num_lanes: int, way: str) -> None:
    """A stream over an endless source ends; weights are those after the steps that were counted."""
    module, serial = pair()
    pairs = batches(1)
    closed = anyio.Event()

    async def source() -> AsyncIterator[Any]:
        try:
            while True:
                yield pairs[0]
        finally:
            closed.set()

    async def loop(stream: asyncdp.StepStream) -> None:
        async for step in stream:
            if step.index == 3:
                if way == "aclose":
                    await stream.aclose()
                elif way == "cancel":
                    scope.cancel()
                else:
                    return

    async with engine(module, num_lanes) as one:
        with anyio.CancelScope() as scope:
            if way == "break":
                async with one.train(source(), cross_entropy, sgd(module)) as stream:
                    await loop(stream)
            else:
                await loop(one.train(source(), cross_entropy, sgd(module)))
        gc.collect()
        await closed.wait()
        await one.runtime.run(int)  # behind whatever runs
        num_steps = one.statistics().num_steps
        assert 4 <= num_steps <= 6
        await one.train_step(*pairs[0], cross_entropy, sgd(module))
        assert one.statistics().num_steps == num_steps + 1
    trained(serial, pairs * (num_steps + 1))
    assert distance(module, serial) < 1e-12


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_a_step_that_runs_is_given_up(num_lanes: int) -> None:
    """Cancelled while a forward runs, a stream changes nothing, drains, and gives the turn on."""
    module, serial = pair()
    latch = Latch()

    def held(outputs: Tensor, targets: Tensor) -> Tensor:
        latch.hold()
        return cross_entropy(outputs, targets)

    async with engine(module, num_lanes) as one:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(results, one.train(batches(5), held, sgd(module), max_ahead=3))
                await latch.wait_entered()
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    await anyio.wait_all_tasks_blocked()
                latch.open()
        assert one.statistics().num_steps == 0
        assert same(module.state_dict(), serial.state_dict())
        (x, y) = batch(4)
        await one.train_step(x, y, cross_entropy, sgd(module))
    trained(serial, [(x, y)])
    assert distance(module, serial) < 1e-12


async def test_closing_the_runtime_ends_the_stream() -> None:
    """Steps that the closed runtime does not take fail; those that were admitted are whole."""
    module, serial = pair()
    (each,) = batches(1)
    one = engine(module, 2)

    async def close_in_the_middle() -> None:
        async for step in one.train(itertools.repeat(each), cross_entropy, sgd(module)):
            if step.index == 2:
                await one.aclose()

    with pytest.raises(RuntimeClosedError):
        await close_in_the_middle()
    trained(serial, [each] * one.statistics().num_steps)
    assert distance(module, serial) < 1e-12
    with pytest.raises(RuntimeClosedError):
        one.train([each], cross_entropy, sgd(module))


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_the_scheduler_steps_with_the_optimizer(num_lanes: int) -> None:
    """Each result has the rate of its own step; schedule and weights are a plain loop's."""
    module, serial = pair()
    pairs = batches(7)
    optimizer, plain = sgd(module), sgd(serial)
    schedule, expected = (torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (optimizer, plain))
    async with engine(module, num_lanes) as one:
        steps = await results(one.train(pairs, cross_entropy, optimizer, scheduler=schedule))
    rates = []
    for x, y in pairs:
        rates.append(plain.param_groups[0]["lr"])
        serial_step(serial, plain, x, y, cross_entropy)
        expected.step()
    assert [step.learning_rate for step in steps] == rates
    assert schedule.state_dict() == expected.state_dict()
    assert distance(module, serial) < 1e-12


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_scaler_and_clipping(num_lanes: int) -> None:
    """A scaler scales and skips as in a plain loop; the schedule does not note what it skips."""
    module, serial = pair()
    pairs = batches(5)
    pairs[2] = (pairs[2][0] * float("inf"), pairs[2][1])
    optimizer, plain = sgd(module), sgd(serial)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def clip() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), 0.05)

    async with engine(module, num_lanes) as one:
        steps = await results(
            one.train(pairs, cross_entropy, optimizer, scaler=scaler, scheduler=schedule, before_step=clip)
        )
    assert scaler.get_scale() == 32.0
    assert [step.learning_rate for step in steps] == [0.1, 0.05, 0.025, 0.025, 0.0125]
    for index, (x, y) in enumerate(pairs):
        plain.param_groups[0]["lr"] = steps[index].learning_rate
        plain.zero_grad()
        cross_entropy(serial(x), y).backward()
        nn.utils.clip_grad_norm_(serial.parameters(), 0.05)
        if index != 2:
            plain.step()
    assert distance(module, serial) < 1e-12


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("norms", [False, True])
async def test_accumulated_batches_are_one_step(num_lanes: int, norms: bool) -> None:
    """Batches of a step count by their rows, an incomplete last step too; rates and losses are a step's."""
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(8) if norms else nn.Tanh()
    module: Any = nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 3)).double().eval()
    serial = copy.deepcopy(module)
    pairs = [batch(count) for count in (6, 3, 1, 6, 6, 6, 4)]
    optimizer, plain = adamw(module), adamw(serial)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    async with engine(module, num_lanes) as one:
        steps = await results(
            one.train(pairs, cross_entropy, optimizer, scheduler=schedule, accumulate=3, max_ahead=1)
        )
        assert one.statistics().num_steps == 3
    assert [(step.index, step.rows, step.learning_rate) for step in steps] == [
        (0, 10, 0.01),
        (1, 18, 0.005),
        (2, 4, 0.0025),
    ]
    for step in steps:
        group = pairs[3 * step.index : 3 * step.index + 3]
        x, y = (torch.cat(each) for each in zip(*group, strict=True))
        plain.param_groups[0]["lr"] = step.learning_rate
        loss = serial_step(serial, plain, x, y, cross_entropy)
        torch.testing.assert_close(step.loss, loss)
    assert distance(module, serial) < 1e-12


async def test_accumulated_statistics_and_parameters_of_some_batches_only() -> None:
    """Buffers move with each batch; a parameter that only some batches of a step use gets their gradient."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)
            self.always, self.rarely = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, rare: bool) -> Tensor:
            x = self.norm(x)
            return self.always(x) + self.rarely(x) if rare else self.always(x)

    torch.manual_seed(0)
    module = Sometimes().double()
    serial = copy.deepcopy(module)
    pairs = [((x, index == 0), y) for index, (x, y) in enumerate(batches(4))]
    for num_lanes in (1, 2):
        module = copy.deepcopy(serial)
        other = copy.deepcopy(serial)
        async with engine(module, num_lanes) as one:
            await results(one.train(pairs, cross_entropy, sgd(module), accumulate=4))
        plain = sgd(other)
        for (x, rare), y in pairs:
            for rows in (slice(None),) if num_lanes == 1 else (slice(3), slice(3, 6)):
                keep = copy.deepcopy(other.norm.state_dict())
                (cross_entropy(other(x[rows], rare), y[rows]) / 4 / num_lanes).backward()
                if rows.start:  # the first lane's statistics count
                    other.norm.load_state_dict(keep)
        plain.step()
        assert distance(module, other) < 1e-12
        assert int(module.norm.num_batches_tracked) == 4


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_a_failing_batch_fails_its_whole_step(num_lanes: int) -> None:
    """Nothing of the batches that were accumulated before it is left, neither gradients nor buffers."""
    torch.manual_seed(0)
    module: Any = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    optimizer = sgd(module)
    fail = Failing(3 * num_lanes)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        fail()
        return cross_entropy(outputs, targets)

    before = snapshot(module, optimizer)
    async with engine(module, num_lanes) as one:
        with pytest.raises(KeyError):
            await results(one.train(batches(8), loss_fn, optimizer, accumulate=4))
    assert same(before, snapshot(module, optimizer))


async def test_gradients_of_before_go_into_the_first_step() -> None:
    """What `no_sync` steps have accumulated and what is in .grad is added once, as by `train_step`."""
    module, serial = pair()
    pairs = batches(3)
    async with engine(module, 2) as one:
        with one.no_sync():
            await one.train_step(*pairs[0], cross_entropy, sgd(module))
            with pytest.raises(ValueError, match="no_sync"):
                one.train(pairs, cross_entropy, sgd(module))
        await results(one.train(pairs[1:], cross_entropy, sgd(module)))
    plain = sgd(serial)
    cross_entropy(serial(pairs[0][0]), pairs[0][1]).backward()
    cross_entropy(serial(pairs[1][0]), pairs[1][1]).backward()
    plain.step()
    trained(serial, pairs[2:], plain)
    assert distance(module, serial) < 1e-12


async def test_modes_are_those_of_the_call() -> None:
    """Evaluating the module in the loop's body does not change the mode of steps that run meanwhile."""
    module: Any = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.999), nn.Linear(8, 3)).double().eval()
    serial = copy.deepcopy(module)
    pairs = batches(6)
    async with engine(module, 1) as one:
        async for _ in one.train(pairs, cross_entropy, sgd(module)):
            module.train()
    trained(serial, pairs)
    assert same(module.state_dict(), serial.state_dict())


async def test_grad_mode_and_autocast_are_those_of_the_call() -> None:
    """Steps train under no_grad too, and run under the autocast that was on at the call."""
    module = mlp(torch.float32)
    dtypes: list[torch.dtype] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        dtypes.append(outputs.dtype)
        return cross_entropy(outputs.float(), targets)

    async with engine(module, 1) as one:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            stream = one.train([batch(4, torch.float32)] * 3, loss_fn, sgd(module))
        assert len(await results(stream)) == 3
    assert dtypes == [torch.bfloat16] * 3


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_beside_predictions_and_snapshots(num_lanes: int) -> None:
    """Predictions see the weights of one whole step, and so do copies of the whole state."""

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.inner(x)

    module = Twice(nn.Linear(5, 3, bias=False).double())
    optimizer = sgd(module)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 / (1 + count))

    def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
        return outputs[0].sum(1).mean() + 0 * targets.sum()

    # With the gradient of ones, all weights are alike after every step.
    with torch.no_grad():
        module.inner.weight.zero_()
    pairs = [(torch.ones(4, 5).double(), torch.ones(4))] * 40
    async with engine(module, num_lanes) as one:
        view = one.in_mode(training=False)

        async def predict() -> None:
            for _ in range(10):
                with torch.no_grad():
                    first, second = await view(torch.ones(2, 5).double())
                assert torch.equal(first, second)
                assert bool((first == first[0, 0]).all())
                state = await one.snapshot(optimizer)
                weight = state["module"]["inner.weight"]
                assert bool((weight == weight[0, 0]).all())

        async with anyio.create_task_group() as group:
            group.start_soon(predict)
            steps = await results(one.train(pairs, loss_fn, optimizer, scheduler=schedule))
    assert len(steps) == 40


async def test_two_streams_and_single_steps_take_turns() -> None:
    """Streams of two engines over one module, and single steps, are all taken, one after the other."""
    module, serial = pair()
    each = batch(6)
    optimizer = sgd(module)
    async with engine(module, 2) as one, engine(module, 1) as two, anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(one.train_step, *each, cross_entropy, optimizer)
        for stream in (one, two, two):
            group.start_soon(results, stream.train([each] * 10, cross_entropy, optimizer))
    trained(serial, [each] * 40)
    assert distance(module, serial) < 1e-12


async def test_on_devices_that_complete_later() -> None:
    """On a lane whose tasks complete late the next step is issued before the one before is complete."""
    module = mlp()
    lanes = fake_devices(1)
    lanes[0].hold()
    async with asyncdp.Runtime(lanes) as runtime:
        one = asyncdp.DataParallel(module, runtime=runtime)
        module.to(lanes[0].device)
        taken: list[int] = []

        async with anyio.create_task_group() as group:
            group.start_soon(take_all, one.train(batches(4), cross_entropy, sgd(module)), taken)
            await lanes[0].wait_issued(2)
            await anyio.wait_all_tasks_blocked()
            assert (lanes[0].num_issued, lanes[0].num_pending, taken) == (2, 2, [])
            lanes[0].release(1)
            await lanes[0].wait_issued(3)
            assert taken == [0]
            lanes[0].release()
    assert taken == [0, 1, 2, 3]


async def test_mistakes_are_refused_at_once() -> None:
    """What cannot work is a mistake with a remedy before anything runs."""
    module, _ = pair()
    optimizer = sgd(module)
    other = torch.optim.lr_scheduler.StepLR(sgd(module), 1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    pairs = batches(1)
    async with engine(module, 1) as one:
        with pytest.raises(NotAnOptimizerError):
            one.train(pairs, cross_entropy, None)
        with pytest.raises(ClosureOptimizerError):
            one.train(pairs, cross_entropy, torch.optim.LBFGS([torch.ones(1)]))
        for scheduler, message in (
            (other, "belongs to another optimizer"),
            (plateau, "yourself"),
            (3, "got int"),
            (optimizer, "got SGD"),
        ):
            with pytest.raises(NotASchedulerError, match=message):
                one.train(pairs, cross_entropy, optimizer, scheduler=scheduler)
        for wrong in (torch.ones(3), {"x": 1}, 3, "text"):
            with pytest.raises(TypeError, match="iterable of batches"):
                one.train(wrong, cross_entropy, optimizer)  # type: ignore[arg-type]
        for options in ({"max_ahead": 0}, {"accumulate": 0}, {"max_ahead": True}, {"accumulate": 1.5}):
            with pytest.raises(ValueError, match="1 or more, an int"):
                one.train(pairs, cross_entropy, optimizer, **options)  # type: ignore[arg-type]


async def test_nothing_of_a_stream_stays() -> None:
    """Batches, losses and the module are free once a stream has ended, without a collection."""
    module = mlp()
    each = batch(4)
    refs = [weakref.ref(each[0]), weakref.ref(module)]
    gc.disable()
    try:
        async with engine(module, 2) as one:
            steps = await results(one.train([each], cross_entropy, sgd(module)))
            refs.append(weakref.ref(steps[0].loss))
            del each, steps
            assert refs[0]() is None
            assert refs[2]() is None
        del one, module
        assert refs[1]() is None
    finally:
        gc.enable()


async def test_sum_reduction_and_inputs_without_rows() -> None:
    """Sums add up, and batches of nothing that has rows count alike."""
    module, serial = pair()
    pairs = [batch(count) for count in (4, 2)]

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, reduction="sum")

    async with engine(module, 2) as one:
        (step,) = await results(one.train(pairs, total, sgd(module), accumulate=2, loss_reduction="sum"))
    x, y = (torch.cat(each) for each in zip(*pairs, strict=True))
    torch.testing.assert_close(step.loss, serial_step(serial, sgd(serial), x, y, total))
    assert distance(module, serial) < 1e-12

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, factor: float) -> Tensor:
            return self.weight * factor

    def to_number(output: Tensor, target: float) -> Tensor:
        return mse_loss(output, torch.tensor(target))

    constant = Constant()
    async with engine(constant, 2) as two:
        (step,) = await results(two.train([(1.0, 2.0), (3.0, 4.0)], to_number, sgd(constant), accumulate=2))
    assert step.rows is None
    torch.testing.assert_close(constant.weight.detach(), torch.tensor(0.1 * (2 * 2 + 2 * 12) / 2))
