"""Whatever is passed to the public constructors and methods, a mistake is told by the argument's name."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

import asyncdp
from asyncdp import Batcher, DataParallel, Runtime
from asyncdp.errors import AsyncDPError

WRONG: dict[str, Any] = {
    "text": "x",
    "bytes": b"x",
    "object": object(),
    "nan": float("nan"),
    "minus": -3,
    "long": -(10**5000),  # Python refuses to show it
    "huge": 10**400,  # no float is as large
    "list": [object()],
    "dict": {1: 2},
    "tensor": torch.ones(2),
    "type": int,
}
"""By kind; what an argument takes of them is left out below."""

COUNT = {"text", "bytes", "object", "nan", "minus", "long", "list", "dict", "tensor", "type"}
SECONDS = COUNT | {"huge"}
FUNCTION = COUNT - {"type"}
FLAG = OTHER = COUNT
DIM = COUNT - {"minus", "long"}
BATCHES = COUNT - {"list"}
MODULE = torch.nn.Linear(2, 2)
ROWS = torch.ones(4, 2)
OPTIMIZER = torch.optim.SGD(MODULE.parameters(), lr=0.1)


def mean(outputs: torch.Tensor, targets: Any = None) -> torch.Tensor:
    """A function of one batch, and a loss."""
    return outputs.mean()


BATCHER = {
    **dict.fromkeys(["max_batch_size", "max_queue", "retry", "runtime", "pad_to"], COUNT),
    **dict.fromkeys(["max_wait", "timeout", "max_age", "hang_timeout", "max_in_flight"], SECONDS),
    **dict.fromkeys(["engine", "size_of", "collate", "split"], FUNCTION),
    "max_padding": SECONDS,
    "pad": SECONDS - {"nan", "minus"},
    "name": COUNT - {"text"},
}
RUNTIME = {"devices": COUNT, "max_queue": COUNT, "hang_timeout": SECONDS, "spin": SECONDS}
ENGINE = {
    **dict.fromkeys(["module", "devices", "output_device", "num_lanes", "runtime", "bucket_bytes"], COUNT),
    "checksum": FLAG,
    "dim": DIM,
    "process_group": COUNT,
}
LOSS = {
    "loss_fn": FUNCTION,
    "before_step": FUNCTION,
    **dict.fromkeys(["optimizer", "loss_reduction", "scaler"], OTHER),
}
TRAIN_STEP = {**LOSS, "reduce_only": FLAG}
TRAIN = {**LOSS, "batches": BATCHES, **dict.fromkeys(["scheduler", "accumulate", "max_ahead"], OTHER)}
MAP = {"batches": BATCHES, "ordered": FLAG, "max_in_flight": COUNT, "on_error": COUNT}
CALL = {"timeout": SECONDS, "priority": COUNT - {"minus", "long"}}
CALL_MANY = {**CALL, "samples": COUNT - {"list", "tensor"}}
VERBS: dict[Callable[..., Any], tuple[dict[str, Any], dict[str, set[str]]]] = {
    asyncdp.scatter: ({"inputs": ROWS, "devices": "cpu*2"}, {"devices": COUNT, "dim": DIM}),
    asyncdp.gather: (
        {"outputs": [ROWS, ROWS], "output_device": "cpu"},
        {"outputs": COUNT - {"list"}, "output_device": COUNT, "dim": DIM},
    ),
    asyncdp.replicate: (
        {"module": MODULE, "devices": "cpu*2"},
        {"module": COUNT, "devices": COUNT, "detach": FLAG},
    ),
    asyncdp.parallel_apply: (
        {"modules": [MODULE], "inputs": [ROWS]},
        {"modules": COUNT, "inputs": COUNT - {"list"}, "kwargs": COUNT, "devices": COUNT},
    ),
    asyncdp.data_parallel: (
        {"module": MODULE, "inputs": ROWS, "devices": "cpu*2"},
        {
            "module": COUNT,
            "devices": COUNT,
            "output_device": COUNT,
            "dim": DIM,
            "module_kwargs": COUNT - {"dict"},
        },
    ),
    asyncdp.backward: (
        {"tensors": torch.ones((), requires_grad=True)},
        {
            **dict.fromkeys(["tensors", "grad_tensors", "inputs"], COUNT - {"tensor"}),
            **dict.fromkeys(["retain_graph", "create_graph"], FLAG),
        },
    ),
}


def is_told(error: Exception, name: str) -> bool:
    """Whether an error is one of this package that says which argument is meant."""
    if isinstance(error, AsyncDPError):
        return True
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    raised_here = "asyncdp" in frame.f_code.co_filename
    return isinstance(error, (TypeError, ValueError)) and name in str(error) and raised_here


async def not_told(call: Callable[..., Any], given: dict[str, Any], wrong: dict[str, set[str]]) -> list[str]:
    """Pass everything wrong to a function; return what was taken, or refused in words of others."""
    missed = []
    for name, kind in [(name, kind) for name, kinds in wrong.items() for kind in sorted(kinds)]:
        try:
            result = call(**{**given, name: WRONG[kind]})
            if inspect.isawaitable(result):
                await result
            missed.append(f"{name}: a {kind} was taken")
        except Exception as error:
            if not is_told(error, name):
                missed.append(f"{name}: a {kind} gives {type(error).__name__}: {error}")
    return missed


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("make", "given", "wrong"),
    [
        (Batcher, {"engine": mean}, BATCHER),
        (Batcher, {"engine": mean, "size_of": len}, {"max_cost": COUNT}),
        (Runtime, {"devices": "cpu"}, RUNTIME),
        (DataParallel, {"module": MODULE, "devices": "cpu"}, ENGINE),
        *((verb, given, wrong) for verb, (given, wrong) in VERBS.items()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_functions_and_constructors(
    make: Callable[..., Any], given: dict[str, Any], wrong: dict[str, set[str]]
) -> None:
    """Every argument of every kind is refused before anything is made or run."""
    assert set(wrong) <= set(inspect.signature(make).parameters)
    assert not await not_told(make, given, wrong)


@pytest.mark.asyncio
async def test_methods() -> None:
    """Methods of a runtime, an engine, a view of it and a batcher refuse what they cannot use."""
    step = {"loss_fn": mean, "optimizer": OPTIMIZER}
    missed = []
    async with Runtime("cpu") as runtime:
        engine = DataParallel(MODULE, runtime=runtime)
        async with Batcher(torch.relu, runtime=runtime) as batcher:
            for call, given, wrong in (
                (runtime.run, {"function": int}, {"function": FUNCTION, "lane": COUNT, "num_threads": COUNT}),
                (
                    engine.train_step,
                    {"inputs": ROWS, "targets": None, **step},
                    {**LOSS, "reduce_only": COUNT},
                ),
                (engine.train, {"batches": [(ROWS, None)], **step}, TRAIN),
                (engine.map, {"batches": [ROWS]}, MAP),
                (engine.in_mode(False).map, {"batches": [ROWS]}, MAP),
                (engine.in_mode, {}, {"training": COUNT}),
                (engine.snapshot, {}, {"optimizer": COUNT}),
                (batcher, {"sample": ROWS}, CALL),
                (batcher.call_nowait, {"sample": ROWS}, CALL),
                (
                    batcher.call_many_nowait,
                    {"samples": [ROWS]},
                    {**CALL, "samples": COUNT - {"list", "tensor"}},
                ),
                (batcher.check_room, {}, {"num_samples": COUNT}),
                *((each.aclose, {}, {"timeout": SECONDS}) for each in (runtime, engine, batcher)),
            ):
                missed += await not_told(call, given, wrong)
            assert not missed
            assert (await batcher(torch.ones(2))).shape == (2,)  # nothing was closed, and no lane was lost


@pytest.mark.parametrize("export", [asyncdp.export_prometheus, asyncdp.export_opentelemetry])
def test_exporters(export: Callable[..., Any]) -> None:
    """What is no batcher has nothing to export."""
    with pytest.raises(TypeError, match=r"batcher must be an asyncdp\.Batcher, but got 3"):
        export(3)
