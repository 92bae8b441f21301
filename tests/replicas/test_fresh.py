"""Passes give what they would give if every replica were made fresh from the module at the call."""

from __future__ import annotations

import copy
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import asyncdp
from asyncdp.errors import LazyModuleError, UnsupportedModuleError

from .ways import WAYS, way

torch.optim.SGD([torch.ones(1)], 0.1)  # the first one imports much, for which no event loop should wait

pytestmark = pytest.mark.anyio
every_way = pytest.mark.parametrize("name", WAYS)


class Module(nn.Module):
    """A linear layer whose forward first calls `leave(self, x)`."""

    def __init__(self, leave: Callable[[Any, Tensor], object], **parts: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.layer.weight)
        self.leave = leave
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        found = self.leave(self, x)
        out = self.layer(x)
        return out + found if isinstance(found, (int, float, Tensor)) else out


def first(found: Any) -> float:
    """Return the first number of a result."""
    return torch.as_tensor(found[0]).flatten()[0].item()


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return copies of everything that a forward may have left."""
    return {
        f"{name}.{key}": dict(value) if isinstance(value, dict) else copy.copy(value)
        for name, each in module.named_modules()
        for key, value in vars(each).items()
        if key not in ("_parameters", "_buffers", "_modules", "_asyncdp_replicas", "leave")
    }


def cache(m: Any, x: Tensor) -> float:
    if getattr(m, "memory", None) is None:
        m.memory = m.layer.weight.item() * 10
    return m.memory


def count(m: Any, x: Tensor) -> int:
    m.num = getattr(m, "num", 0) + 1
    return m.num


def delete(m: Any, x: Tensor) -> int:
    del m.config
    return 1


def add_hook(m: Any, x: Tensor) -> None:
    m.layer.register_forward_hook(lambda _m, _args, out: out + 1)


def add_pre_hook(m: Any, x: Tensor) -> None:
    m.layer.register_forward_pre_hook(lambda _m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)


def append(m: Any, x: Tensor) -> int:
    m.items.append(len(m.items))
    return len(m.items)


def add_to_set(m: Any, x: Tensor) -> int:
    m.items.add(len(m.items))
    return len(m.items)


def write_key(m: Any, x: Tensor) -> int:
    m.items[len(m.items)] = x
    return len(m.items)


def nested(m: Any, x: Tensor) -> int:
    m.items["a"][0][1].append(1)
    return len(m.items["a"][0][1])


def become(m: Any, x: Tensor) -> float:
    found = 0.0 if type(m.mark) is nn.Identity else 1.0
    m.mark.__class__ = nn.ReLU
    return found


def fresh_submodule(m: Any, x: Tensor) -> float:
    found = float(hasattr(m, "act"))
    m.act = nn.ReLU()
    return found


CASES: dict[str, tuple[Callable[..., object], dict[str, Any], float]] = {
    "attribute": (cache, {}, 11),
    "number": (count, {}, 2),
    "deleted": (delete, {"config": 3}, 2),
    "hook": (add_hook, {}, 2),
    "pre hook": (add_pre_hook, {}, 2),
    "list": (append, {"items": []}, 2),
    "full list": (append, {"items": [1, 2]}, 4),
    "deque": (append, {"items": deque(maxlen=5)}, 2),
    "set": (add_to_set, {"items": set()}, 2),
    "dict": (write_key, {"items": {}}, 2),
    "ordered dict": (write_key, {"items": OrderedDict()}, 2),
    "default dict": (write_key, {"items": defaultdict(list)}, 2),
    "counter": (lambda m, x: m.items.update("a") or m.items["a"], {"items": Counter()}, 2),
    "nested": (nested, {"items": {"a": [(0, [])]}}, 2),
    "class": (become, {"mark": nn.Identity()}, 1),
    "submodule without tensors": (fresh_submodule, {}, 1),
}


@every_way
@pytest.mark.parametrize("case", CASES)
async def test_nothing_is_left_to_the_next_pass(name: str, case: str) -> None:
    """What a forward sets, adds, deletes or registers is there neither in the next pass nor in the module."""
    leave, parts, expected = CASES[case]
    module = Module(leave, **copy.deepcopy(parts))
    before = attributes(module)
    async with way(name, module) as run:
        for records in (False, True, False):
            with torch.set_grad_enabled(records):
                found = await run(torch.ones(2, 1))
            assert first(found) == expected
            assert attributes(module) == before


@every_way
async def test_a_pass_that_raises_leaves_nothing(name: str) -> None:
    """What a forward had set when it raised is undone too."""

    def fail(m: Any, x: Tensor) -> int:
        m.num = getattr(m, "num", 0) + 1
        m.items.append(1)
        if x[0, 0] < 0:
            raise ValueError("as it was told to")
        return m.num + len(m.items)

    module = Module(fail, items=[])
    async with way(name, module) as run:
        with pytest.raises(ValueError, match="as it was told to"):
            await run(-torch.ones(2, 1))
        assert first(await run(torch.ones(2, 1))) == 3
    assert module.items == []


class Cached(nn.Module):
    """Keeps a product of its weight until `train()` is called, as many attention modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.memory: Tensor | None = None

    def train(self, mode: bool = True) -> Cached:
        self.memory = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.memory is None:
            self.memory = self.weight * 2
        return x * self.memory


@pytest.mark.parametrize("num_lanes", [1, 2, "auto"])
async def test_evaluation_after_a_step_has_the_new_weights(num_lanes: Any) -> None:
    """A product of weights that a forward keeps is not that of the weights before a step."""
    module = Cached()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:
        for _ in range(4):
            for records in (False, True):
                module.eval()
                with torch.set_grad_enabled(records):
                    found = await engine(torch.ones(4, 1))
                assert torch.equal(found, torch.ones(4, 1) * module.weight * 2)
            module.train()
            await engine.train_step(torch.ones(4, 1), torch.zeros(4, 1), functional.mse_loss, optimizer)
            assert module.memory is None


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("has_buffer", [False, True])
@pytest.mark.parametrize("case", CASES)
async def test_steps_leave_nothing(case: str, num_lanes: int, has_buffer: bool) -> None:
    """A training step leaves of its forward and backward what it leaves in the optimizer, and no more."""
    leave, parts, expected = CASES[case]
    if case in ("attribute", "deleted", "submodule without tensors"):
        has_buffer = False  # beside a buffer that changes, plain values survive
    module = Module(leave, **copy.deepcopy(parts))
    if has_buffer:
        module.mean = nn.BatchNorm1d(1)
    before = attributes(module)
    seen: list[float] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(first(output))
        return (output * 0).sum()

    async with asyncdp.DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:
        for _ in range(3):
            await engine.train_step(
                torch.ones(4, 1),
                torch.zeros(4, 1),
                loss,
                torch.optim.SGD(module.parameters(), 0.1),
                loss_reduction="sum",
            )
            assert attributes(module) == before
    assert seen == [expected] * 3 * num_lanes


async def test_lists_hold_the_tensors_of_their_own_batch() -> None:
    """Batches that run at the same time do not see what the others put into lists and dicts of self."""
    gate = threading.Barrier(2, timeout=20)

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features: list[Any] = [None]
            self.by_name: dict[str, Any] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.features[0] = x
            self.by_name["x"] = x
            gate.wait()
            return torch.cat([self.features[0], self.by_name["x"]], 1)

    async with asyncdp.DataParallel(Features(), "cpu*2", num_lanes="all") as engine:
        for k in range(300):
            found = await engine(torch.tensor([[float(k)], [float(-k)]]))
            assert found.tolist() == [[float(k)] * 2, [float(-k)] * 2]


class Rotary(nn.Module):
    """A table in a buffer that grows, and is made anew; a flag beside it says how long it is."""

    inverse: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.ones(1), persistent=False)
        self.longest = 4
        self.note: Any = "short"
        self.shape = (1, 1)
        self.scratch: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.scratch.append(1)
        if x.shape[1] > self.longest:
            self.register_buffer("inverse", self.inverse * 2, persistent=False)
            self.register_buffer("other", torch.ones(1), persistent=False)
            self.longest, self.note, self.shape = x.shape[1], None, (x.shape[1], 1)
            self.layers = [x]
        return x * self.inverse


@every_way
async def test_values_beside_a_replaced_buffer_survive_with_it(name: str) -> None:
    """A buffer that the forward replaced comes back with the plain values that it set beside, and no more."""
    module = Rotary()
    twin = copy.deepcopy(module)
    async with way(name, module) as run:
        for length in (3, 6, 6, 3, 9, 7, 3):
            x = torch.ones(2, length)
            found = await run(x)
            twin(x[:1])
            expected = twin(x)
            assert torch.equal(torch.stack([*found]), expected)
            assert (module.longest, module.note, module.shape) == (twin.longest, twin.note, twin.shape)
            assert torch.equal(module.inverse, twin.inverse)
            assert not module.state_dict()
            assert module.scratch == []
            assert not hasattr(module, "layers")


class Normalised(nn.Module):
    """Sets its scale by the first batch, as ActNorm does."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("scale", torch.zeros(1))
        self.is_ready = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.is_ready:
            self.scale.copy_(x[0])
            self.is_ready = True
        return x * 0 + self.scale + self.weight


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("is_step", [False, True])
async def test_passes_that_wait_have_the_values_of_those_before(num_lanes: int, is_step: bool) -> None:
    """A flag beside a buffer reaches passes and steps whose call came before it was set."""
    module = Normalised()
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    found: dict[int, Tensor] = {}

    async with asyncdp.DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:

        async def call(k: int) -> None:
            x = torch.full((2, 1), float(k))
            if is_step:
                found[k] = await engine.train_step(x, None, lambda out, _: out.mean(), optimizer)
            else:
                found[k] = await engine(x)

        async with anyio.create_task_group() as group:
            for k in range(1, 9):
                group.start_soon(call, k)
    values = {value for each in found.values() for value in each.flatten().tolist()}
    if num_lanes == 1:
        assert len(values) == 1, values
    assert module.is_ready
    assert module.scale.item() in values


class Counting(nn.Module):
    """Counts rows in a tensor that is no buffer, and in one inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rows = torch.zeros(1)
        self.more = [torch.zeros(1)]

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(x)):
            self.rows += 1
            self.more[0].add_(1)
        return x + self.weight


@pytest.mark.parametrize("training", [True, False])
@every_way
async def test_counters_are_those_of_the_first_lane(name: str, training: bool) -> None:
    """Tensors that are no buffers are lane 0's, as buffers are, and no lane writes to another's."""
    if name == "auto":
        pytest.skip("the first lane's share depends on the number of lanes that is chosen")
    module = Counting().train(training)
    rows = module.rows
    splits = name in ("data_parallel", "all", "number")
    async with way(name, module) as run:
        for k in range(1, 20):
            await run(torch.ones(8, 1))
            assert module.rows is rows
            if training or name not in ("on_one_lane", "map", "batcher"):
                assert module.rows == module.more[0] == k * (4 if splits else 8)


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_a_failed_step_counts_nothing(num_lanes: int) -> None:
    """Counters of a step that succeeds are those of the first lane; a step that fails leaves them alone."""
    module = Counting()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def fail() -> None:
        raise ValueError("before the step")

    async with asyncdp.DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:
        for k in range(1, 5):
            with pytest.raises(ValueError, match="before the step"):
                await engine.train_step(
                    torch.ones(8, 1), torch.ones(8, 1), functional.mse_loss, optimizer, before_step=fail
                )
            await engine.train_step(torch.ones(8, 1), torch.ones(8, 1), functional.mse_loss, optimizer)
            assert module.rows == module.more[0] == k * 8 / num_lanes


@every_way
@pytest.mark.parametrize("kind", ["submodule", "parameter"])
async def test_parts_made_in_forward_are_refused(name: str, kind: str) -> None:
    """A submodule with weights, or a parameter, that the first forward makes is named in an error."""

    class Growing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if kind == "submodule" and not hasattr(self, "made"):
                self.made = nn.Linear(1, 1)
            elif not hasattr(self, "made"):
                self.made = nn.Parameter(torch.ones(1))  # type: ignore[assignment]
            return self.made(x) if kind == "submodule" else x * self.made

    module = nn.Sequential(Growing())
    async with way(name, module) as run:
        with pytest.raises(LazyModuleError, match=rf"{kind} '0.made'.*[Rr]un one batch"):
            await run(torch.ones(2, 1))
        assert not [*module.parameters()]
        module(torch.ones(2, 1))
        assert torch.equal(torch.stack([*await run(torch.ones(2, 1))]), module(torch.ones(2, 1)))


@every_way
@pytest.mark.parametrize("kind", [list, dict])
async def test_modules_put_into_containers_in_forward_are_refused(name: str, kind: type) -> None:
    """A module with weights that the first forward puts into a list or dict would differ per lane as well."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made: Any = kind()

        def forward(self, x: Tensor) -> Tensor:
            if not self.made:
                layer = nn.Linear(1, 1)
                self.made.append(layer) if kind is list else self.made.update({0: layer})
            return self.made[0](x)  # type: ignore[no-any-return]

    module = Growing()
    async with way(name, module) as run:
        with pytest.raises(LazyModuleError, match=r"'Linear'.*[Rr]un one batch"):
            await run(torch.ones(2, 1))
        assert not module.made
        module(torch.ones(2, 1))
        assert torch.equal(torch.stack([*await run(torch.ones(2, 1))]), module(torch.ones(2, 1)))


async def test_slots_are_refused() -> None:
    """Attributes in `__slots__`, which no replica could have its own of, are named before anything runs."""

    class Slotted(nn.Module):
        __slots__ = ("state",)

    with pytest.raises(UnsupportedModuleError, match=r"Slotted.*__slots__"):
        asyncdp.DataParallel(nn.Sequential(Slotted()), "cpu*2")


class Stated(nn.Module):
    """Returns what a caller may set between two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.zeros(1))
        self.scale = 0
        self.options = {"bias": 0}
        self.config = SimpleNamespace(more=[0])

    def forward(self, x: Tensor) -> Tensor:
        bias = self.options["bias"] + self.config.more[0]
        state = [self.training, self.part.training, self.scale, bias]
        return self.part(torch.zeros(1)) * 0 + torch.tensor([[float(each) for each in state]] * len(x))


def change(module: Any, k: int) -> list[float]:
    """Set everything in another way for each `k`; return what the next call must give."""
    module.train(bool(k & 1))
    module.part.train(bool(k & 2))
    module.scale = k
    module.options["bias"] = k // 4
    module.config.more[0] = 10 * k
    return [float(k & 1), float(bool(k & 2)), float(k), float(k // 4 + 10 * k)]


@every_way
async def test_calls_run_in_the_state_of_their_moment(name: str) -> None:
    """Modes, attributes and containers count as they stood at the call, whatever is set afterwards."""
    module = Stated()
    expected: dict[int, list[float]] = {}
    found: dict[int, Any] = {}
    async with way(name, module) as run:

        async def call(k: int) -> None:
            expected[k] = change(module, k)
            found[k] = await run(torch.ones(1, 1))

        for _ in range(5):
            async with anyio.create_task_group() as group:
                for k in range(8):
                    group.start_soon(call, k)
            for k, rows in found.items():
                for row in rows:
                    assert row.tolist() == expected[k]


@every_way
async def test_hooks_count_as_of_the_call(name: str) -> None:
    """A hook that is removed after a call runs in that call's pass, and one put there later does not."""
    module = nn.Sequential(nn.Identity())
    found: dict[int, Any] = {}
    async with way(name, module) as run:

        async def call(k: int) -> None:
            handle = module[0].register_forward_hook(lambda _m, _args, out: out * 0 + k)
            running = run(torch.ones(1, 1))
            group.start_soon(remove, handle)
            found[k] = await running

        async def remove(handle: Any) -> None:
            handle.remove()

        for k in range(6):
            async with anyio.create_task_group() as group:
                group.start_soon(call, k)
                await anyio.lowlevel.checkpoint()
            assert first(found[k]) == k
        assert first(await run(torch.ones(1, 1))) == 1


class Replaceable(nn.Module):
    """Adds up its parts; waits for `latch` where the rows are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.latch = threading.Event()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("table", torch.zeros(1))
        replace_parts(self, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] == 0:
            assert self.latch.wait(20)
        return self.layer(x) + self.table


def replace_parts(module: Any, k: int) -> None:
    """Put other parts of each kind in place, so that rows of ones give `111 * k`."""
    module.layer = nn.Linear(1, 1)
    module.layer.weight = nn.Parameter(torch.full((1, 1), 100.0 * k))
    module.layer.bias = nn.Parameter(torch.full((1,), 10.0 * k))
    module.table = torch.full((1,), float(k))


@every_way
@pytest.mark.parametrize("is_deep", [False, True])
async def test_parts_are_those_of_the_call(name: str, is_deep: bool) -> None:
    """A part that is put in place of another while a call waits for its lane is none of that call."""
    module = Replaceable()
    found: dict[int, Any] = {}
    async with way(name, nn.Sequential(module) if is_deep else module) as run:

        async def call(k: int) -> None:
            found[k] = await run(torch.full((2, 1), float(k != 0)))

        for number in (2, 5):  # the second round finds replicas, and what it needs to know of the module
            module.latch.clear()
            replace_parts(module, number - 1)
            async with anyio.create_task_group() as group:
                group.start_soon(call, 0)
                group.start_soon(call, 0)  # for the other lane
                for k in (number, number + 1):
                    group.start_soon(call, k)
                    await anyio.wait_all_tasks_blocked()
                    replace_parts(module, k)
                module.latch.set()
            assert [first(found[k]) for k in (number, number + 1)] == [111.0 * (number - 1), 111.0 * number]
            assert first(await run(torch.ones(2, 1))) == 111.0 * (number + 1)


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("has_buffer", [False, True])
async def test_parts_of_steps_are_those_of_the_call(num_lanes: int, has_buffer: bool) -> None:
    """A step that waits trains the parts that the module had at its call."""
    module = Replaceable()
    if not has_buffer:
        del module._buffers["table"]
    module.table = torch.zeros(1)
    layer = module.layer
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:

        async def step(value: float) -> None:
            x = torch.full((2, 1), value)
            await engine.train_step(x, None, lambda out, _: out.mean(), optimizer)

        async with anyio.create_task_group() as group:
            for value in (0.0, 1.0):
                group.start_soon(step, value)
                await anyio.wait_all_tasks_blocked()
            module.layer = nn.Linear(1, 1)
            module.latch.set()
    assert layer.bias.item() == 10 - 0.5 * 2
    assert layer.weight.item() == 100 - 0.5


@pytest.mark.parametrize("name", ["data_parallel", "all", "one lane", "on_one_lane"])
async def test_frozen_parameters_are_those_of_the_call(name: str) -> None:
    """`requires_grad` counts as it stood at the call."""
    latch = threading.Event()

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(1))
            self.b = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            if x[0, 0] == 0:
                assert latch.wait(20)
            return torch.cat([x * self.a, x * self.b], 1) if x[0, 0] != 2 else x * self.b

    module = Held()
    found: dict[int, Tensor] = {}
    async with way(name, module) as run:

        async def call(k: int) -> None:
            found[k] = await run(torch.full((2, 1), float(k)))

        async with anyio.create_task_group() as group:
            group.start_soon(call, 0)
            group.start_soon(call, 1)
            await anyio.wait_all_tasks_blocked()
            module.b.requires_grad_(False)
            group.start_soon(call, 2)
            await anyio.wait_all_tasks_blocked()
            module.b.requires_grad_(True)
            latch.set()
    assert found[1].requires_grad
    assert not found[2].requires_grad
    found[1].sum().backward()
    assert module.a.grad is not None


@every_way
async def test_a_change_while_a_pass_runs_stays(name: str) -> None:
    """What the caller changes while a forward runs is not undone with what the forward leaves."""
    entered, latch = threading.Event(), threading.Event()

    def hold(m: Any, x: Tensor) -> int:
        entered.set()
        assert latch.wait(20)
        m.items.append(1)
        m.mine = 5
        return m.scale

    module = Module(hold, items=[], scale=0)
    async with way(name, module) as run, anyio.create_task_group() as group:
        group.start_soon(run, torch.ones(2, 1))
        await anyio.to_thread.run_sync(entered.wait)
        module.eval()
        module.scale = 7
        module.items.append("caller's")
        handle = module.register_forward_hook(lambda _m, _args, out: out)
        latch.set()
    assert not module.training
    assert (module.scale, module.items, hasattr(module, "mine")) == (7, ["caller's"], False)
    assert handle.id in module._forward_hooks
