"""What runs in each of the processes of a test: the same on all, but for the rank.

Processes of even rank run asyncio, the others trio.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import anyio
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

import asyncdp
from asyncdp import errors


def run(rank: int, main: Callable[[], Awaitable[Any]]) -> Any:
    return anyio.run(main, backend="trio" if rank % 2 else "asyncio")


def net(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(16) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(8, 16), middle, nn.Linear(16, 3)).double()


class Everything(nn.Module):
    """Tied, frozen, unused, sparse and conditional parameters, and a temperature that its loss reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8, sparse=True)
        self.first = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(8, 8)
        self.by_chance = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(self.frozen(self.first(self.table(ids))))
        if (ids == 0).any():
            x = x + 0 * self.by_chance(x).sum()
        return self.last(x)


def batch(step: int, num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(num_rows, 8, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (num_rows,), generator=generator)


def part(values: Tensor, rank: int, sizes: list[int]) -> Tensor:
    return values.split(sizes)[rank]


def engine_of(module: nn.Module, lanes: str = "cpu") -> asyncdp.DataParallel:
    return asyncdp.DataParallel(module, lanes, num_lanes="all", process_group=dist.group.WORLD)


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor | None]:
    moments = [value for own in optimizer.state.values() for value in own.values()]
    values = [*module.state_dict().values(), *(each.grad for each in module.parameters()), *moments]
    return [value.clone() if isinstance(value, Tensor) else None for value in values]


def are_equal(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    """Whether tensors are the same bit by bit."""
    return len(first) == len(second) and all(
        a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


def take_steps(rank: int, lanes: str, sizes: list[int], reduction: str) -> Any:
    """Take steps, each process with its own rows; return losses and weights."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction=reduction)

    async def main() -> Any:
        module = net()
        with torch.no_grad():
            module[0].weight.mul_(1 + rank)
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        losses = []
        async with engine_of(module, lanes) as engine:
            for step in range(3):
                mine = [part(each, rank, sizes) for each in batch(step, sum(sizes))]
                losses.append(await engine.train_step(*mine, loss_fn, optimizer, loss_reduction=reduction))
        return losses, module.state_dict()

    return run(rank, main)


def take_every_kind(rank: int, lanes: str) -> Any:
    """Accumulate, reduce only, clip and scale over a module with everything; return what came of it."""

    async def main() -> Any:
        module = Everything()
        dense = [each for name, each in module.named_parameters() if name != "table.weight"]
        outside = nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = torch.optim.SGD([*dense, module.table.weight, outside], 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        norms: list[Tensor] = []

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(outputs * module.temperature * outside, targets)

        def clip() -> None:
            norms.append(nn.utils.clip_grad_norm_(dense, 0.1))

        ids = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 9, 9])
        targets = torch.arange(10) % 3
        mine = part(ids, rank, [7, 3]), part(targets, rank, [7, 3])
        async with engine_of(module, lanes) as engine:
            await engine.train_step(*mine, loss_fn, None, reduce_only=True)
            outside.grad = None  # no step without the optimizer knows of it
            found = {name: each.grad for name, each in module.named_parameters()}
            reduced = {
                name: each if each is None else (each.is_sparse, each.to_dense())
                for name, each in found.items()
            }
            with engine.no_sync():
                await engine.train_step(*mine, loss_fn, optimizer)
            await engine.train_step(*mine, loss_fn, optimizer, before_step=clip, scaler=scaler)
        return reduced, module.state_dict(), outside.detach(), norms, scaler.get_scale()

    return run(rank, main)


class Trouble(nn.Module):
    """Raises where it is told to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return self.inner(x)  # type: ignore[no-any-return]


TROUBLES = {
    "forward": {},
    "interrupt": {},
    "cancelled": {},
    "lengths": {},
    "no_sync": {},
    "loss": {"loss_fn": lambda outputs, targets: outputs},
    "before_step": {"before_step": lambda: 1 / 0},
    "sum": {"loss_reduction": "sum"},
    "max": {"loss_reduction": "max"},
    "optimizer": {},
    "learning rate": {},
    "tensor learning rate": {},
    "scale": {},
}
"""What process 1 does wrong."""


def fail_in_every_way(rank: int, lanes: str, norm: bool) -> Any:
    """Fail on process 1; return what each process raised, and whether anything changed."""

    async def main() -> Any:
        module = Trouble(net(norm=norm))
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        found = {}

        async def attempt(engine: asyncdp.DataParallel, name: str, is_wrong: bool) -> None:
            mine = [part(each, rank, [6, 4]) for each in batch(1, 10)]
            options: Any = {"loss_fn": functional.cross_entropy, "optimizer": optimizer}
            if is_wrong:
                options |= TROUBLES[name]
            if is_wrong and name == "lengths":
                mine[1] = mine[1][1:]
            optimizer.param_groups[0]["lr"] = 0.5 if is_wrong and name == "learning rate" else 1e-2
            if name == "tensor learning rate":
                optimizer.param_groups[0]["lr"] = torch.tensor(0.5 if is_wrong else 0.25)
            if name == "scale":
                options["scaler"] = torch.amp.GradScaler("cpu", init_scale=8.0 if is_wrong else 4.0)
            if is_wrong and name == "optimizer":
                options["optimizer"] = torch.optim.SGD(module.parameters(), 1e-2)
            troubles = {"forward": ValueError("bad record"), "interrupt": KeyboardInterrupt()}
            module.error = troubles.get(name) if is_wrong else None
            if is_wrong and name == "no_sync":
                with engine.no_sync():
                    await engine.train_step(*mine, **options)
            elif is_wrong and name == "cancelled":
                with anyio.fail_after(0):
                    await engine.train_step(*mine, **options)
            else:
                await engine.train_step(*mine, **options)

        async with engine_of(module, lanes) as engine:
            await attempt(engine, "fine", False)
            for name in TROUBLES:
                before = state_of(module, optimizer)
                try:
                    await attempt(engine, name, rank == 1)
                except BaseException as error:
                    same = are_equal(before, state_of(module, optimizer))
                    found[name] = type(error).__name__, getattr(error, "rank", None), str(error), same
            await attempt(engine, "fine", False)
        return found, state_of(module, optimizer)

    return run(rank, main)


def train_streams(rank: int, counts: list[int], ending: str) -> Any:
    """Train on streams of unequal length; return what each step gave, the error, and the state."""

    async def main() -> Any:
        module = net(norm=True)
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        found: list[Any] = []

        def source() -> Iterator[Any]:
            for step in range(counts[rank]):
                yield tuple(part(each, rank, [7, 5]) for each in batch(step, 12))
            if ending == "fails" and rank:
                raise OSError("the disk is gone")

        async with engine_of(module) as engine:
            error = None
            try:
                stream = engine.train(source(), functional.cross_entropy, optimizer, scheduler=schedule)
                async with stream:
                    async for step in stream:
                        found.append((step.index, step.rows, step.loss.item(), step.learning_rate))
                        if ending == "left" and rank and step.index == 1:
                            break
            except Exception as raised:
                error = type(raised).__name__, getattr(raised, "rank", None), str(raised)
            await engine.train_step(*batch(99, 4), functional.cross_entropy, optimizer)
        return found, error, state_of(module, optimizer)

    return run(rank, main)


def queue_ahead_or_not(rank: int) -> Any:
    """Train on a stream whose learning rate falls, process 0 with steps queued ahead, process 1 with none."""

    async def main() -> Any:
        module = net()
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        taken = [anyio.Event() for _ in range(4)]

        async def source() -> AsyncIterator[Any]:
            for step in range(4):
                if rank and step:
                    await taken[step - 1].wait()
                yield batch(step, 4)

        rates = []
        async with engine_of(module) as engine:
            stream = engine.train(source(), functional.cross_entropy, optimizer, scheduler=schedule)
            async for step in stream:
                rates.append(step.learning_rate)
                taken[step.index].set()
        return rates, state_of(module, optimizer)

    return run(rank, main)


def rejoin_with_scalers(rank: int) -> Any:
    """Rejoin with scalers of unlike scales, and take a step with them; return the scale and the state."""

    async def main() -> Any:
        module = net()
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=(8.0, 2.0)[rank])
        async with engine_of(module) as engine:
            await engine.rejoin(dist.group.WORLD, optimizer, None, scaler)
            await engine.train_step(*batch(0, 4), functional.cross_entropy, optimizer, scaler=scaler)
        return scaler.get_scale(), state_of(module, optimizer)

    return run(rank, main)


def wait_for_late_peer(rank: int) -> Any:
    """Begin a step that process 1 joins only after this one's caller has given up; then take one together."""

    async def main() -> Any:
        module = net()
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        found = []
        async with engine_of(module) as engine:
            step = engine.train_step, *batch(1, 4), functional.cross_entropy, optimizer
            if rank == 0:
                with anyio.move_on_after(0.2) as scope:
                    await step[0](*step[1:])
                found.append(scope.cancelled_caught)
                found.append(await engine(batch(1, 4)[0]) is not None)  # its lane is free
            await anyio.to_thread.run_sync(dist.barrier)  # process 1 comes only now
            if rank == 1:
                try:
                    await step[0](*step[1:])
                except asyncdp.PeerStepError as error:
                    found.append((error.rank, "cancelled" in str(error)))
            await step[0](*step[1:])
        return found, state_of(module, optimizer)

    return run(rank, main)


def refuse_constructions(rank: int) -> list[str]:
    """Return what is said of groups that are none, and of modules that are not alike."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("tp", "dp"))
    asyncdp.DataParallel(net(), "cpu", process_group=mesh["dp"])
    wrong: list[Any] = ["gloo", mesh, dist.GroupMember.NON_GROUP_MEMBER]
    found = []
    for group in wrong:
        try:
            asyncdp.DataParallel(net(), "cpu", process_group=group)
        except errors.ProcessGroupError as error:
            found.append(str(error))
    try:
        asyncdp.DataParallel(nn.Linear(3 + rank, 2), "cpu", process_group=dist.group.WORLD)
    except errors.ProcessMismatchError as error:
        found.append(str(error))
    return found


def fail_in_optimizer(rank: int) -> Any:
    """Have the optimizer of process 1 raise half way; return what follows, and the state after a rejoin."""

    async def main() -> Any:
        module = net()
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        names = []
        async with engine_of(module) as engine:
            await engine.train_step(*batch(0, 4), functional.cross_entropy, optimizer)
            hook = optimizer.register_step_post_hook(lambda *_: 1 // (1 - rank))
            for _ in range(2):
                try:
                    await engine.train_step(*batch(1, 4), functional.cross_entropy, optimizer)
                    names.append("fine")
                except Exception as error:
                    names.append(type(error).__name__)
            hook.remove()
            num_done = await engine.rejoin(dist.group.WORLD, optimizer)
            await engine.train_step(*batch(2, 4), functional.cross_entropy, optimizer)
        return names, num_done, state_of(module, optimizer)

    return run(rank, main)


def lose_a_process(rank: int, path: str, step_of_death: str) -> Any:
    """Lose process 2 in a step; go on with the two that are left."""

    async def main() -> Any:
        module = net(norm=True)
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        names = []

        def die() -> None:
            if rank == 2:
                os._exit(9)

        async with engine_of(module, "cpu*2") as engine:
            await engine.train_step(*batch(0, 4), functional.cross_entropy, optimizer)
            options: Any = {"before_step": die} if step_of_death == "before_step" else {}
            loss_fn = functional.cross_entropy
            if step_of_death == "loss":

                def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
                    die()
                    return functional.cross_entropy(outputs, targets)

            before = state_of(module, optimizer)
            for _ in range(2):
                try:
                    await engine.train_step(*batch(1, 4), loss_fn, optimizer, **options)
                except asyncdp.PeerStepError as error:
                    names.append("rejoin" in str(error))
            same = are_equal(before, state_of(module, optimizer))
            await engine(batch(1, 4)[0])
            group = small_group(rank, path)
            num_done = await engine.rejoin(group, optimizer)
            await engine.train_step(*batch(2, 4), functional.cross_entropy, optimizer)
        return names, same, num_done, state_of(module, optimizer)

    return run(rank, main)


def small_group(rank: int, path: str) -> Any:
    """Make the default group anew, of the two processes that are left."""
    dist.destroy_process_group()
    store = dist.FileStore(path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    return dist.group.WORLD


def names_of_threads(rank: int) -> list[str]:
    return sorted(each.name for each in threading.enumerate() if each.name.startswith("asyncdp"))
