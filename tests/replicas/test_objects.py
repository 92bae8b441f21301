"""Objects of any class on a module: each replica has its own, where nothing but attributes makes them up."""

from __future__ import annotations

import threading
import weakref
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

from .ways import WAYS, way

torch.optim.SGD([torch.ones(1)], 0.1)  # the first one imports much, for which no event loop should wait

pytestmark = pytest.mark.anyio


class Plain:
    """Counts in a property over an attribute, and says that it equals everything."""

    def __init__(self) -> None:
        self._num = 0

    @property
    def num(self) -> int:
        return self._num

    @num.setter
    def num(self, value: int) -> None:
        self._num = value

    def __eq__(self, other: object) -> bool:
        return True

    def __bool__(self) -> bool:
        raise RuntimeError("nobody asks an object on a module for its truth")

    __hash__ = None  # type: ignore[assignment]


@dataclass(slots=True)
class Slotted:
    """Keeps its attributes in slots."""

    num: int = 0
    items: list[int] = field(default_factory=list)


class Base:
    """Has a slot that nobody has set, below a class with a `__dict__`."""

    __slots__ = ("num", "unset")


class Mixed(Base):
    """Has slots and a `__dict__`."""

    def __init__(self) -> None:
        self.num = 0


class History(list[int]):
    """A list that wants an argument, and has an attribute."""

    def __init__(self, num: int) -> None:
        self.num = num


class Owner:
    """Refers back to the module that it belongs to, and keeps a method of itself there."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.num = 0
        module.__dict__["count_all"] = self.count_all

    def count_all(self) -> int:
        self.num += 1
        self.module.num = getattr(self.module, "num", 0) + 1
        return self.num + self.module.num  # type: ignore[no-any-return, operator]


class Referrer:
    """Refers weakly to the module that it belongs to."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)


class Holder(nn.Module):
    """Adds what `leave(self)` returns, a number, to each row."""

    def __init__(self, leave: Callable[[Any], object], held: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.leave = leave
        self.__dict__["held"] = held(self) if held in (Owner, Referrer) else held()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight + torch.as_tensor(self.leave(self), dtype=x.dtype)


def count(m: Any) -> int:
    m.held.num += 1
    return m.held.num


def append(m: Any) -> int:
    items = m.held if isinstance(m.held, list) else m.held.items
    items.append(1)
    return len(items)


def count_below(m: Any) -> int:
    each = m.held[0]
    each.num = getattr(each, "num", 0) + 1
    return each.num  # type: ignore[no-any-return]


def write_key(m: Any) -> int:
    m.held[len(m.held)] = 1
    return len(m.held)


def count_by_reference(m: Any) -> int:
    me = m.held.module()
    me.num = getattr(me, "num", 0) + 1
    return m.num  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[[Any], object], Any, float]] = {
    "namespace": (count, lambda: SimpleNamespace(num=0), 1),
    "property": (count, Plain, 1),
    "slots": (count, Slotted, 1),
    "list in slots": (append, Slotted, 1),
    "slots and dict": (count, Mixed, 1),
    "in a list": (count_below, lambda: [Plain()], 1),
    "in a tuple": (count_below, lambda: (Slotted(),), 1),
    "subclass of list": (append, lambda: History(5), 1),
    "attribute of such a list": (count, lambda: History(5), 6),
    "mapping": (write_key, UserDict, 1),
    "refers to its module": (lambda m: m.held.count_all(), Owner, 2),
    "bound method": (lambda m: m.count_all(), Owner, 2),
    "module that is no submodule": (count_below, lambda: [nn.Identity()], 1),
    "weak reference": (count_by_reference, Referrer, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["data_parallel", "one lane", "on_one_lane", "map", "batcher"])
async def test_objects_are_as_they_were_at_the_call(name: str, case: str) -> None:
    """What a forward sets on an object that its module has is there in no other pass, lane or module."""
    leave, held, expected = CASES[case]
    module = Holder(leave, held)
    async with way(name, module) as run:
        for records in (False, True, False):
            with torch.set_grad_enabled(records):
                for row in await run(torch.zeros(2, 1)):
                    assert row.item() == expected
    assert leave(module) == expected


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_steps_leave_nothing_on_objects(num_lanes: int) -> None:
    """Training steps see an object on a module as it was at the call, too."""
    seen: list[float] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(output[0].item())
        return functional.mse_loss(output * 0, target)

    for leave, held, expected in CASES.values():
        module = Holder(leave, held)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        async with asyncdp.DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:
            for _ in range(2):
                await engine.train_step(torch.zeros(2, 1), torch.zeros(2, 1), loss, optimizer)
        assert seen == [expected] * 2 * num_lanes
        seen.clear()


@pytest.mark.parametrize("name", WAYS)
async def test_tensors_on_objects_are_those_of_the_first_lane(name: str) -> None:
    """A tensor on an object counts like one on the module: lane 0 updates it in place, the others copies."""

    def add(m: Any) -> Tensor:
        m.held.total += 1
        return m.held.total.clone()  # type: ignore[no-any-return]

    module = Holder(add, lambda: SimpleNamespace(total=torch.zeros(1)))
    async with way(name, module) as run:
        for _ in range(3):
            before = module.held.total.item()
            rows = await run(torch.zeros(2, 1))
            assert rows[0].item() == before + 1
        assert module.held.total.item() >= 3


async def test_objects_with_a_lock_are_shared() -> None:
    """An object that holds a lock, or leads to one, is meant for several threads and is nobody's own."""

    class Counted:
        def __init__(self) -> None:
            self.lock = threading.Condition()
            self.num = 0

        def count(self) -> int:
            with self.lock:
                self.num += 1
            return 0

    module = Holder(lambda m: m.held.counted.count(), lambda: SimpleNamespace(counted=Counted()))
    assert (await asyncdp.data_parallel(module, torch.zeros(4, 1), "cpu*2")).tolist() == [[0.0]] * 4
    assert module.held.counted.num == 2
