"""Predictions and snapshots beside training steps, in every way of calling: whole steps, in the right mode.

The module multiplies by its weights, with dropout after that. In eval mode its answer to ones is the weights
themselves, so that every answer is compared, bit for bit, with the weights after each step. An answer of
train mode, or of half a step, is none of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
from machine import origin
from torch import Tensor, nn

import asyncdp

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
DEVICES = "cpu*2"
NUM_WEIGHTS = 32
Predict = Callable[[Tensor], Awaitable[Any]]


class Scaled(nn.Module):
    """Rows times weights, each weight a parameter of its own, then dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.rand(1) + 1 for _ in range(NUM_WEIGHTS))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, of ones, times the weights."""
        scaled: Tensor = self.dropout(x * torch.cat([*self.weights]))
        return scaled


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Return a loss that pulls the weights to and fro."""
    return (output * target).mean()


async def predict_by(kind: str, caller: Any, stack: AsyncExitStack) -> Predict:
    """Return a way to call an engine, or a view of one."""
    if kind == "batcher":
        batcher = await stack.enter_async_context(asyncdp.Batcher(caller, max_batch_size=4))

        async def one_row(x: Tensor) -> Any:
            return (await batcher(x[0])).unsqueeze(0)

        return one_row
    if kind == "map":

        async def mapped(x: Tensor) -> Any:
            async with caller.map([x]) as results:
                return await anext(aiter(results))

        return mapped
    return caller.on_one_lane if kind == "on_one_lane" else caller


async def check(num_lanes: Any, kind: str, in_view: bool, count: int) -> dict[str, Any]:
    """Predict, or take snapshots, `count` times beside at least as many steps."""
    module = Scaled()
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    states = {weights_of(module)}
    found: list[tuple[float, ...]] = []
    done = asyncio.Event()
    async with (
        asyncdp.DataParallel(module, DEVICES, num_lanes=num_lanes) as engine,
        AsyncExitStack() as stack,
    ):
        caller = engine.in_mode(training=False) if in_view else engine
        predict = None if kind == "snapshot" else await predict_by(kind, caller, stack)
        x = torch.ones(2, NUM_WEIGHTS)

        async def train() -> None:
            steps = 0
            while steps < count or not done.is_set():
                target = torch.randn(2, NUM_WEIGHTS)
                module.train()
                await engine.train_step(x, target, loss_of, optimizer)
                states.add(weights_of(module))
                steps += 1

        trainer = asyncio.create_task(train())
        for _ in range(count):
            if predict is None:
                copied = (await engine.snapshot())["module"]
                found.append(tuple(torch.cat([*copied.values()]).tolist()))
                continue
            if not in_view:
                module.eval()
            rows = await predict(x)
            found += [tuple(row.tolist()) for row in rows.detach()]
        done.set()
        await trainer
    wrong = sum(each not in states for each in found)
    return {
        "way": f"{'view, ' if in_view else ''}{kind}",
        "num_lanes": str(num_lanes),
        "answers": len(found),
        "steps": len(states) - 1,
        "states_seen": len({*found} & states),
        "wrong": wrong,
    }


def weights_of(module: Scaled) -> tuple[float, ...]:
    return tuple(torch.cat([*module.weights]).tolist())


def as_table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [
        "# Predictions and snapshots beside training steps",
        "",
        f"`scripts/check_modes`, commit {result['commit']}, {result['date']}, {result['machine']}, Python "
        f"{result['python']}, torch {result['torch']}.",
        "",
        f"A module with dropout on {DEVICES} is trained by one task and called by another, which calls "
        "`module.eval()` before (or calls a view in eval mode). Each answer, and each snapshot, is compared "
        "bit for bit with the weights after every step: *wrong* is one that equals none of them, by dropout "
        "or by half a step.",
        "",
        "| way | num_lanes | answers | steps beside | different weights seen | wrong |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['way']} | {row['num_lanes']} | {row['answers']} | {row['steps']} | {row['states_seen']} | "
        f"{row['wrong']} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check all ways, print, and write the results; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="predictions and steps of each way")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for num_lanes in ("all", "auto", 1):
        for in_view in (False, True):
            for kind in ("call", "on_one_lane", "map", "batcher"):
                rows.append(asyncio.run(check(num_lanes, kind, in_view, options.count)))
                print(rows[-1], file=sys.stderr, flush=True)
        rows.append(asyncio.run(check(num_lanes, "snapshot", False, options.count)))
        print(rows[-1], file=sys.stderr, flush=True)
    result = {**origin(), "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "check_modes.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "check_modes.md").write_text(as_table(result))
    print(as_table(result))
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
