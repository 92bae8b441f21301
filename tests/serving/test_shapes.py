"""Batches are padded to the few shapes that `pad_to=` names, and nobody sees a difference in the results."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

import asyncdp

pytestmark = pytest.mark.anyio

SHAPES = [(2, 4), (2, 8), (4, 8)]


async def answers(batcher: asyncdp.Batcher, samples: list[Any]) -> list[Any]:
    """The results of calls at the same time, in the order of the samples."""
    found: dict[int, Any] = {}

    async def call(index: int) -> None:
        found[index] = await batcher(samples[index])

    async with anyio.create_task_group() as group:
        for index in range(len(samples)):
            group.start_soon(call, index)
    return [found[index] for index in range(len(samples))]


class Sums:
    """Sums each row, and notes the shapes that it gets; as a function, an async one or a module."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, batch: Tensor) -> Tensor:
        self.shapes.append(tuple(batch.shape))
        return batch.flatten(1).sum(1)


@pytest.mark.parametrize("kind", ["function", "async", "engine"])
async def test_batches_have_the_shapes_that_were_named(kind: str) -> None:
    """Lengths and samples are filled up to the smallest shape that fits; results are those of the samples."""
    model = Sums()
    samples = [torch.full((length,), float(length)) for length in (1, 2, 4, 3, 5, 8, 6)]

    async def awaited(batch: Tensor) -> Tensor:
        return model(batch)

    class Module(torch.nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return model(batch)

    async with asyncdp.Runtime("cpu") as runtime:
        engine: Any = {"function": model, "async": awaited}.get(kind)
        options: dict[str, Any] = {"runtime": runtime}
        if kind == "engine":
            engine, options = asyncdp.DataParallel(Module(), runtime=runtime), {}
        async with asyncdp.Batcher(engine, max_batch_size=4, pad=0, pad_to=SHAPES, **options) as batcher:
            for some in (samples[:1], samples[:3], samples[3:5], samples[3:6], samples):
                results = await answers(batcher, some)
                assert [float(result) for result in results] == [float(each.sum()) for each in some]
    assert {*model.shapes} <= {*SHAPES}
    assert model.shapes[0] == (2, 4)


async def test_what_no_shape_holds_stays_as_it_is() -> None:
    """A batch that is longer, or larger, than every shape is padded to its longest sample alone."""
    model = Sums()
    async with (
        asyncdp.Runtime("cpu") as runtime,
        asyncdp.Batcher(model, max_batch_size=4, pad=0, pad_to=[(2, 4)], runtime=runtime) as batcher,
    ):
        await batcher(torch.ones(9))
        await batcher(torch.ones(3))
    assert model.shapes == [(1, 9), (2, 4)]


async def test_numbers_alone_fill_up_samples_of_any_collate_and_split() -> None:
    """A collate and split of one's own see the last sample repeated, and their results for it are dropped."""
    seen: list[list[str]] = []

    def collate(samples: Any) -> list[str]:
        seen.append(list(samples))
        return list(samples)

    def split(output: list[str], samples: Any) -> list[str]:
        assert len(output) == len(samples)
        return output

    async with (
        asyncdp.Runtime("cpu") as runtime,
        asyncdp.Batcher(
            lambda texts: [text.upper() for text in texts],
            collate=collate,
            split=split,
            pad_to=[1, 4],
            runtime=runtime,
        ) as batcher,
    ):
        assert await answers(batcher, ["a"]) == ["A"]
        assert await answers(batcher, ["a", "b", "c"]) == ["A", "B", "C"]
    assert {len(each) for each in seen} <= {1, 4}


async def test_several_leaves_and_further_dimensions() -> None:
    """Each leaf is padded in the dimensions that a shape names and that it has; others stay."""
    seen: list[list[tuple[int, ...]]] = []

    def model(tokens: Tensor, features: Tensor, label: Tensor) -> Tensor:
        seen.append([tuple(each.shape) for each in (tokens, features, label)])
        return tokens.sum(1) + features.sum((1, 2)) + label

    async with (
        asyncdp.Runtime("cpu") as runtime,
        asyncdp.Batcher(model, pad=0, pad_to=[(2, 4)], runtime=runtime) as batcher,
    ):
        result = await batcher((torch.ones(3), torch.ones(2, 5), 7.0))
    assert float(result) == 20.0
    assert seen == [[(2, 4), (2, 4, 5), (2,)]]


async def test_a_bad_sample_fails_alone() -> None:
    """Parts of a batch that raised are padded as well, and good samples get their results."""

    def model(batch: Tensor) -> Tensor:
        if bool(batch.isnan().any()):
            raise KeyError("bad")
        assert tuple(batch.shape) in SHAPES
        return batch.sum(1)

    samples = [torch.ones(3), torch.full((2,), float("nan")), torch.ones(1)]
    async with (
        asyncdp.Runtime("cpu") as runtime,
        asyncdp.Batcher(model, pad=0, pad_to=SHAPES, runtime=runtime) as batcher,
    ):
        calls = [batcher.call_nowait(sample) for sample in samples]
        assert float(await calls[0]) == 3.0
        with pytest.raises(KeyError):
            await calls[1]
        assert float(await calls[2]) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_to": []}, "pad_to must hold shapes"),
        ({"pad_to": 8}, "pad_to must hold shapes"),
        ({"pad_to": [(0, 3)], "pad": 0}, "pad_to must hold shapes"),
        ({"pad_to": [()], "pad": 0}, "pad_to must hold shapes"),
        ({"pad_to": [(2, 2.5)], "pad": 0}, "pad_to must hold shapes"),
        ({"pad_to": [(2, 4)]}, "Pass pad="),
        ({"pad_to": [(2, 4)], "pad": 0, "collate": torch.stack}, "Pass pad="),
    ],
)
async def test_mistakes(options: dict[str, Any], message: str) -> None:
    """What is no set of shapes, or lengths that nothing pads to, is refused as the batcher is made."""
    with pytest.raises(ValueError, match=message):
        asyncdp.Batcher(Sums(), **options)
