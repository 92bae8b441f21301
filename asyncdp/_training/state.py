"""The whole state of a module and its optimizer, as of one moment between two steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._replicas.order import Use, in_turn
from .._replicas.snapshot import ModuleSnapshot


@contextmanager
def unchanging(parts: ModuleSnapshot, optimizer: Any) -> Iterator[None]:
    """Run a block on this lane that reads a whole module, while no step changes it or the optimizer."""
    # A forward in train mode changes buffers as it goes: then the block runs beside none.
    use = Use(parts, changes=parts.updates_buffers, optimizer=optimizer)
    with in_turn(use), torch.inference_mode(False), torch.no_grad():
        yield


def copy_state(module: nn.Module, parts: ModuleSnapshot, optimizer: Any) -> dict[str, Any]:
    """Copy the state on this lane while no step changes it; see `DataParallel.snapshot`.

    Args:
        module: the module.
        parts: what it consists of.
        optimizer: None for the module's state alone.
    """
    with unchanging(parts, optimizer):
        state = {"module": module.state_dict()}
        if optimizer is not None:
            state["optimizer"] = optimizer.state_dict()
        return copy.deepcopy(state)
