"""A real classifier learns the same on two lanes as in series."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from .helpers import distance, engine, serial_step

datasets = pytest.importorskip("sklearn.datasets")

NUM_EPOCHS = 6
NUM_TRAIN = 1437


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The images of scikit-learn's digits and their classes, in random order; read here, not on a loop."""
    data: Any = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data / 16.0)[order], torch.tensor(data.target)[order]


@pytest.mark.anyio
async def test_digits_are_learned_as_in_series(digits: tuple[Tensor, Tensor]) -> None:
    """Trained in float64 on two lanes, the classifier tells every test image what the serial one tells."""
    images, classes = digits
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    serial = copy.deepcopy(module)
    optimizer, serial_optimizer = (torch.optim.AdamW(each.parameters(), 3e-3) for each in (module, serial))
    async with engine(module) as one:
        for _ in range(NUM_EPOCHS):
            for rows in torch.randperm(NUM_TRAIN).split(64):
                x, y = images[rows], classes[rows]
                await one.train_step(x, y, functional.cross_entropy, optimizer)
                serial_step(serial, serial_optimizer, x, y, functional.cross_entropy)
    told, expected = (each(images[NUM_TRAIN:]).argmax(1) for each in (module, serial))
    assert torch.equal(told, expected)
    assert (told == classes[NUM_TRAIN:]).double().mean() > 0.9
    assert distance(module, serial) < 1e-8
