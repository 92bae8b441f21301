"""Every use of a name that torch does not document, with the reason for it.

The tests run each of them with torch 2.13; continuous integration with 2.6 too, the oldest version allowed.
A new version of torch is tried against this file first.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

version_of = attrgetter("_version")
"""Return how often a tensor was written in place: the only trace such a write leaves.

An inference tensor counts no writes and raises RuntimeError.
"""

foreach_add_ = torch._foreach_add_
"""Add lists of tensors pairwise, in place, at the cost of one operation."""

foreach_copy_ = torch._foreach_copy_
"""Copy lists of tensors pairwise, in place, at the cost of one operation."""

current_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""Return the address of the current CUDA stream of a device index; `torch.cuda.current_stream` takes longer
than a whole launch. None in a build of torch without CUDA."""

num_function_modes = torch._C._len_torch_function_stack
"""Return how many torch function modes, such as a default device, are active on this thread."""

saved_tensors_hooks_of: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
"""Return the pair of functions that this thread's innermost `saved_tensors_hooks` block packs and unpacks by,
or None; its argument is whether to look for them while a graph is traced too."""

COMPILED_CALL = "_compiled_call_impl"
"""Where `nn.Module.compile` puts the compiled call, which belongs to one module and must not be copied."""


def is_in_backward() -> bool:
    """Return whether autograd runs a backward on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def mark_as_parameter(tensor: Tensor) -> None:
    """Have `isinstance(tensor, nn.Parameter)` hold for a tensor that is not of that class.

    A replica's parameters are results of autograd, which no `nn.Parameter` can be.
    """
    tensor._is_param = True


def storage_address(tensor: Tensor) -> int:
    """Return a number that two tensors share exactly if they share storage, which may hold no memory."""
    return int(tensor.untyped_storage()._cdata)


hooks_of = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
"""Return the two dictionaries of hooks for the gradient of a leaf; None, or empty, where there are none."""


def store_of_group(group: Any) -> Any:
    """Return the store by which the processes of a group have met; KeyError or ValueError without one.

    Connections of an engine's own need one, and `torch.distributed.new_group` would need processes that are
    not in the group. Tried with 2.6 and 2.13.
    """
    from torch.distributed import distributed_c10d  # a build of torch may lack it

    return distributed_c10d._get_process_group_store(group)


def timeout_of_group(group: Any) -> timedelta:
    """Return how long a collective of a group may take: only its backends' options tell. 2.6 to 2.13."""
    from torch.distributed import distributed_c10d

    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout  # type: ignore[no-any-return]
    return distributed_c10d.default_pg_timeout


def flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    """Return the weights that a recurrent module passes to its kernel, which need not be its parameters."""
    return module._flat_weights


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called."""
    return getattr(module, COMPILED_CALL, None) is not None


def optimized_module_types() -> tuple[type, ...]:
    """Return the classes that `torch.compile(module)` returns; none before torch's compiler is imported."""
    found = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return () if found is None else (found,)


def compiler_error() -> type[Exception]:
    """Return the base of all errors of torch's compiler; imports it, which takes seconds the first time."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException
