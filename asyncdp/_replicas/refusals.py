"""Modules that no lane can run as they are, and what of a module replicas leave out."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from itertools import chain

from torch import Tensor, nn

from .._torch_private import is_compiled_in_place
from ..errors import MetaTensorError, OffloadedModuleError

_MATERIALIZE = "Give it values first: module.to_empty(device=...) and module.load_state_dict(...)."

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_placement(root: nn.Module, module: nn.Module) -> None:
    """Refuse a module below `root` that holds no values, or that moves its own weights between devices.

    Raises:
        MetaTensorError, OffloadedModuleError: it is one.
    """
    if getattr(module, "_hf_hook", None) is not None:
        raise OffloadedModuleError(module)
    if any(map(_is_meta, chain(module._parameters.values(), module._buffers.values()))):
        parameters = (f"parameter {name!r}" for name, each in root.named_parameters() if each.is_meta)
        buffers = (f"buffer {name!r}" for name, each in root.named_buffers() if each.is_meta)
        raise MetaTensorError(f"the module's {next(chain(parameters, buffers))}", _MATERIALIZE)


def _is_meta(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def warn_if_compiled(modules: Sequence[nn.Module]) -> None:
    """Warn, once for each module, that replicas run without what `module.compile()` made.

    Args:
        modules: a module and all below it.
    """
    root = modules[0]
    if root not in _warned and any(map(is_compiled_in_place, modules)):
        _warned.add(root)
        warnings.warn(
            f"{type(root).__qualname__}.compile() is ignored: its code belongs to the module, and the "
            "replicas on lanes run without it. Decorate forward with torch.compile instead.",
            stacklevel=2,
        )
