"""The random generators of a process that a training may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch


def capture(devices: Iterable[torch.device]) -> dict[str, Any]:
    """Return the states of torch's, Python's and NumPy's own generators.

    Args:
        devices: CUDA devices among them have one each.
    """
    indices = {device.index for device in devices if device.type == "cuda"}
    return {
        "torch": torch.get_rng_state(),
        "cuda": {index: torch.cuda.get_rng_state(index) for index in indices},
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }


def restore(states: dict[str, Any], devices: Iterable[torch.device]) -> None:
    """Set the generators to what `capture` gave; CUDA devices that had none then are left as they are."""
    torch.set_rng_state(states["torch"])
    indices = {device.index for device in devices if device.type == "cuda"}
    for index in indices & states["cuda"].keys():
        torch.cuda.set_rng_state(states["cuda"][index], index)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
