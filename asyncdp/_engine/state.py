"""Copies of the whole state of a module and its optimizer, as of one moment."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .._replicas.order import Use, in_turn
from .._replicas.snapshot import ModuleSnapshot


def copy_state(module: nn.Module, parts: ModuleSnapshot, optimizer: Any) -> dict[str, Any]:
    """Copy the state on this lane while no step changes it; see `DataParallel.snapshot`.

    Args:
        module: the module.
        parts: what it consists of.
        optimizer: None for the module's state alone.
    """
    # A forward in train mode changes buffers as it goes: then the copy runs beside none.
    use = Use(parts, changes=parts.updates_buffers, optimizer=optimizer)
    with in_turn(use), torch.inference_mode(False), torch.no_grad():
        state = {"module": module.state_dict()}
        if optimizer is not None:
            state["optimizer"] = optimizer.state_dict()
        return copy.deepcopy(state)
