"""Copies of a module, one per device, whose parameters pass their gradients on to the original's."""

from __future__ import annotations

from torch import nn

from .._autograd import Broadcast
from .._checks import check_flags
from .._devices import Devices, parse_devices
from .._replicas.replica import Replica, substitutions
from .._replicas.snapshot import ModuleSnapshot


def replicate(module: nn.Module, devices: Devices, *, detach: bool = False) -> list[nn.Module]:
    """Copy a module deeply to every device.

    Args:
        module: any module but a TorchScript one.
        devices: one replica each; see `parse_devices`.
        detach: leave out the gradient edges; the parameters of the replicas then require none.

    Returns:
        One module per device, of the same class, with its own storage for parameters and buffers.
        Its parameters are no leaves: gradients go to the original's parameters, summed over the
        replicas. `parameters()`, `state_dict()` and the rest work as on the original, tied
        parameters and shared submodules stay so.

    Raises:
        NotAModuleError, LazyModuleError, UnsupportedModuleError: the module cannot be replicated.
    """
    check_flags(detach=detach)
    snapshot = ModuleSnapshot.capture(module)
    targets = parse_devices(devices)
    tensors = snapshot.tensors
    if detach:
        copies = [tensor.detach().to(device, copy=True) for device in targets for tensor in tensors]
    else:
        copies = list(Broadcast.apply(targets, True, *tensors))
    replicas = []
    for lane in range(len(targets)):
        own = copies[lane * len(tensors) : (lane + 1) * len(tensors)]
        replica = Replica(snapshot, deep=True)
        replica.bind(substitutions(tensors, own), {})
        replicas.append(replica.module)
    return replicas
