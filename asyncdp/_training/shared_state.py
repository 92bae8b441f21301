"""What a forward changed in its module, as bytes for other processes."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor

from .._replicas.snapshot import ModuleSnapshot
from .._replicas.survivors import Survivors


def encoded(survivors: Survivors | None) -> bytes:
    """Return all that survives of a forward, with the values of tensors; empty if nothing does."""
    if survivors is None:
        return b""
    loose = {id(tensor): place for place, tensor in enumerate(survivors.snapshot.loose)}
    content = {
        "buffers": [
            (position, name, _plain(after), is_replaced)
            for position, name, _, after, is_replaced in survivors.buffers
        ],
        "loose": [(loose[id(before)], _plain(after)) for before, after in survivors.loose],
        "values": survivors.values,
        "transient": survivors.transient,
        "is_counted": survivors.is_counted,
    }
    return pickle.dumps(content)


def decoded(data: bytes, snapshot: ModuleSnapshot, device: torch.device) -> Survivors | None:
    """Return what survives in this process's module of the forward of another process.

    Args:
        data: of `encoded`.
        snapshot: of the module.
        device: where new buffers go.
    """
    if not data:
        return None
    content = pickle.loads(data)
    buffers = []
    for position, name, values, is_replaced in content["buffers"]:
        before = snapshot.modules[position]._buffers.get(name)
        buffers.append((position, name, before, _tensor(values, device), is_replaced))
    return Survivors(
        snapshot,
        buffers,
        content["values"],
        content["is_counted"],
        [(snapshot.loose[place], _required(_tensor(values, device))) for place, values in content["loose"]],
        content["transient"],
    )


def _plain(tensor: Tensor | None) -> Any:
    """Return a tensor as values that pickle in less time than the tensor itself."""
    if tensor is None:
        return None
    values = tensor.detach().cpu().contiguous()
    return values.reshape(-1).view(torch.uint8).numpy().tobytes(), values.dtype, tuple(values.shape)


def _tensor(values: Any, device: torch.device) -> Tensor | None:
    if values is None:
        return None
    data, dtype, shape = values
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).to(device)


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a loose tensor is never taken away"
    return tensor
