"""Errors about what goes into a pass and comes out of it: values that cannot be split, moved or joined."""

from __future__ import annotations

from .base import AsyncDPError


class LengthMismatchError(AsyncDPError, ValueError):
    """Inputs of one pass differ in length along the dimension they are split on."""

    def __init__(self, dim: int, first: tuple[str, int], other: tuple[str, int]) -> None:
        super().__init__(
            f"inputs differ in length along dim {dim}: "
            f"{first[0]} has {first[1]} and {other[0]} has {other[1]}. "
            "Give every tensor the same length there. Wrap what belongs to the whole batch in asyncdp.Whole, "
            "and a list with one entry per row in asyncdp.PerRow."
        )


class AmbiguousSequenceError(AsyncDPError, ValueError):
    """A list or tuple beside tensors is as long as they are, and may hold one entry per row or not."""

    def __init__(self, name: str, got: object, num_rows: int) -> None:
        super().__init__(
            f"{name} is a {type(got).__qualname__} of {num_rows} entries beside tensors of {num_rows} rows, "
            "which can be read in two ways. One entry per row: wrap it in asyncdp.PerRow, and each lane gets "
            "the entries of its rows. The same for every lane: wrap it in asyncdp.Whole."
        )


class UnsplittableError(AsyncDPError, TypeError):
    """An input does not have its rows along one dimension.

    Args:
        kind: what it is, for the user.
        name: its name for the user.
        remedy: how to pass it instead.
    """

    def __init__(self, kind: str, name: str, remedy: str) -> None:
        super().__init__(f"{name} is a {kind}, which cannot be split along a dimension. {remedy}")


class MetaTensorError(AsyncDPError, ValueError):
    """A tensor is on the meta device, which holds shapes and no values.

    Args:
        name: its name for the user.
        remedy: what to do about it.
    """

    def __init__(self, name: str, remedy: str = "Make it on a real device, such as the CPU.") -> None:
        super().__init__(f"{name} is on the meta device, where tensors have no values. {remedy}")


class OffloadedModuleError(AsyncDPError, TypeError):
    """The module is dispatched or offloaded by hooks that move its weights while it runs."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"cannot replicate a {type(got).__qualname__} that accelerate has dispatched or offloaded: its "
            "hooks move the weights while it runs. Load it on one device, without device_map, or take the "
            "hooks away with accelerate.hooks.remove_hook_from_module(module, recurse=True)."
        )


_SAME_STRUCTURE = (
    "Return the same structure from every shard, with tensors where values differ, and a list with one entry "
    "per row as asyncdp.PerRow(list)."
)


class GatherError(AsyncDPError, ValueError):
    """The outputs of the replicas do not fit together."""

    def __init__(self, cause: str, remedy: str = _SAME_STRUCTURE) -> None:
        super().__init__(f"cannot gather the outputs of the replicas: {cause}. {remedy}")
