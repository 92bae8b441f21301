"""What runs in each of the processes of a test of checkpoints: the same on all, but for the rank."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import asyncdp

from ..runtime.helpers import Latch
from ..training.helpers import Gated, gates
from .checks import are_equal, batch, engine_of, part, run, state_of


class Net(nn.Module):
    """Draws random numbers, and can refuse what is loaded into it."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3)).double()
        self.refuses = refuses

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]

    def get_extra_state(self) -> Any:
        return "state"

    def set_extra_state(self, state: Any) -> None:
        if self.refuses:
            raise ValueError("picky")


def parts(module: nn.Module) -> tuple[Any, Any]:
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


async def step(engine: asyncdp.DataParallel, rank: int, optimizer: Any) -> None:
    mine = [part(each, rank, [6, 4]) for each in batch(1, 10)]
    await engine.train_step(*mine, cross_entropy, optimizer)


def go_on_from_a_checkpoint(rank: int, path: Path) -> Any:
    """Train, save, train on; then load into another engine, and train on there too."""

    async def main() -> Any:
        module = Net()
        optimizer, schedule = parts(module)
        torch.manual_seed(rank)
        async with engine_of(module) as engine:
            for _ in range(3):
                await step(engine, rank, optimizer)
            saved = await engine.save(path, optimizer, schedule, extra=f"of process {rank}")
            at_save = state_of(module, optimizer)
            for _ in range(3):
                await step(engine, rank, optimizer)
        other = Net()
        other_optimizer, other_schedule = parts(other)
        torch.manual_seed(9)
        async with engine_of(other) as engine:
            loaded = await engine.load(path, other_optimizer, other_schedule)
            for _ in range(3):
                await step(engine, rank, other_optimizer)
        is_same = are_equal(state_of(module, optimizer), state_of(other, other_optimizer))
        return is_same, saved.num_steps, loaded.num_steps, loaded.extra, at_save

    return run(rank, main)


def load(rank: int, path: Path) -> Any:
    """Load what one process has saved."""

    async def main() -> Any:
        module = Net()
        optimizer, schedule = parts(module)
        async with engine_of(module) as engine:
            loaded = await engine.load(path, optimizer, schedule)
        return loaded.extra, state_of(module, optimizer)

    return run(rank, main)


def fail_in_every_way(rank: int, folder: Path) -> Any:
    """Go wrong on one process; return what each raised, and whether anything changed."""

    async def main() -> Any:
        module = Net()
        optimizer, schedule = parts(module)
        found = {}
        async with engine_of(module) as engine:
            await step(engine, rank, optimizer)
            await engine.save(folder / "a", optimizer)
            await engine.save(folder / "b", optimizer)
            await step(engine, rank, optimizer)
            first = rank == 0

            async def save_while(action: Callable[[], object], cancels: bool) -> None:
                gates["write"] = latch = Latch()
                async with anyio.create_task_group() as group:
                    group.start_soon(engine.save, folder / "c", optimizer, Gated(optimizer, 1))
                    if first:
                        await latch.wait_entered()
                        action()
                    if cancels and first:
                        group.cancel_scope.cancel()
                    latch.open()
                await anyio.lowlevel.checkpoint()
                if cancels and first:
                    raise ValueError("cancelled")

            async def cancelled() -> None:
                with anyio.fail_after(0):
                    await engine.save(folder / "c", optimizer)

            wrong: dict[str, tuple[Callable[[], Awaitable[Any]], Callable[[], Awaitable[Any]]]] = {
                "step": (lambda: engine.save(folder / "c"), lambda: step(engine, rank, optimizer)),
                "load": (lambda: engine.save(folder / "c"), lambda: engine.load(folder / "a")),
                "nothing": (lambda: engine.load(folder / "a"), lambda: engine.load(folder / "nothing")),
                "another": (lambda: engine.load(folder / "a"), lambda: engine.load(folder / "b")),
                "argument": (lambda: engine.save(folder / "c"), lambda: engine.save(3)),  # type: ignore[arg-type]
                "cancelled": (lambda: engine.save(folder / "c"), cancelled),
                "picky": (lambda: engine.load(folder / "a", optimizer),) * 2,
                "occupied": (lambda: engine.save(folder),) * 2,
                "unpicklable": (lambda: engine.save(folder / "c", optimizer, schedule),) * 2,
                "cancelled while it writes": (lambda: save_while(lambda: None, True),) * 2,
            }
            for name, calls in wrong.items():
                module.refuses = name == "picky" and not first
                schedule.note = lambda: None  # no file can hold it
                before = state_of(module, optimizer)
                try:
                    await calls[rank]()
                except BaseException as error:
                    if isinstance(error, BaseExceptionGroup):
                        error = error.exceptions[0]
                    same = are_equal(before, state_of(module, optimizer))
                    found[name] = type(error).__name__, getattr(error, "rank", None), str(error), same
                module.refuses = False
                await step(engine, rank, optimizer)
            await engine.save(folder / "d", optimizer)
        return found, state_of(module, optimizer)

    return run(rank, main)
