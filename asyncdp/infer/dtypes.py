"""The dtype of every number that goes into the model: one rule for a whole job, whatever a batch holds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import JobUsageError

_FLOATS = ("float16", "bfloat16", "float32", "float64")
INPUT_DTYPES = {
    name: getattr(torch, name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64", *_FLOATS)
}

_ALL = ""


@dataclasses.dataclass(frozen=True)
class InputDtypes:
    """What becomes of the numbers of a record.

    Attributes:
        given: dtype by name of an input, or by "" for all others; everything is converted to it.
        of_model: dtype that the model expects, in the same way; Python's numbers are converted to it, and
            NumPy's doubles, which are rarely meant. Empty: what `torch.tensor` makes of them.
    """

    given: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)
    of_model: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)

    def tensor(self, item: Any, name: str = _ALL) -> torch.Tensor:
        """Return numbers as a tensor whose dtype depends on nothing but the job.

        Args:
            item: a number, an array, a tensor, or nested lists of numbers.
            name: of the input that it is, where inputs have names.

        Raises:
            ValueError: a number does not fit; rounding a fraction is no misfit.
        """
        given = self.given.get(name, self.given.get(_ALL))
        if given is not None:
            return _exactly(item, given)
        if isinstance(item, torch.Tensor):
            return item
        expected = self.of_model.get(name, self.of_model.get(_ALL))
        if isinstance(item, np.ndarray | np.generic):
            if item.dtype != np.float64:
                return torch.as_tensor(item)
            is_float = expected is not None and expected.is_floating_point
            return _exactly(item, expected if expected and is_float else torch.get_default_dtype())
        wide = _wide(item)
        if wide.dtype == torch.bool or wide.is_complex():
            return wide
        natural = torch.get_default_dtype() if wide.is_floating_point() else wide.dtype
        return _exactly(item, natural if expected is None else expected)

    def stacked(self, items: Sequence[Any], name: str = _ALL) -> torch.Tensor | None:
        """Return what stacking the tensors of many items gives, made at once.

        Args:
            items: as `tensor` takes each.
            name: as `tensor` takes it.

        Returns:
            None where the items are not so alike that all go the same way.

        Raises:
            ValueError: a number does not fit.
        """
        expected = self.given.get(name, self.given.get(_ALL))
        if isinstance(items[0], np.ndarray | np.generic):
            if len({(type(item), item.dtype, item.shape) for item in items}) > 1:
                return None
            return self.tensor(np.stack(items), name)
        if expected is None:
            expected = self.of_model.get(name, self.of_model.get(_ALL))
        numbers, shape = _flattened(items)
        kinds = set(map(type, numbers))
        if expected is None or not kinds or not kinds <= {int, float}:
            return None
        try:
            array = np.array(numbers, np.int64 if kinds == {int} else np.float64)
        except OverflowError:  # too large
            return None
        source = torch.from_numpy(array.reshape(shape))
        if kinds == {int, float} and not _holds_integers(source, expected):
            return None
        return _exactly(source, expected)


def parse_dtypes(spec: str | None) -> dict[str, torch.dtype]:
    """Read what `--input-dtype` says: a dtype, or `name=dtype` for one input, several joined by commas.

    Raises:
        JobUsageError: no such dtype.
    """
    dtypes = {}
    for part in spec.split(",") if spec else ():
        name, _, dtype = part.strip().rpartition("=")
        if dtype not in INPUT_DTYPES:
            raise JobUsageError(
                f"--input-dtype {spec}: {dtype!r} is no dtype",
                f"Choose one of {', '.join(INPUT_DTYPES)}, or name inputs as in ids=int64,x=float32.",
            )
        dtypes[name] = INPUT_DTYPES[dtype]
    return dtypes


def dtypes_of_model(module: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes that a model expects of its inputs, "" for those without a name of their own.

    An exported program states them. Elsewhere a model whose first layer is an embedding expects int64,
    every other the dtype of its weights.
    """
    if isinstance(module, torch.fx.GraphModule):
        values = {node.name: node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"}
        stated = {name: value.dtype for name, value in values.items() if isinstance(value, torch.Tensor)}
        if stated:
            return {**stated, _ALL: next(iter(stated.values()))}
    layers = (layer for layer in module.modules() if next(layer.children(), None) is None)
    first = next((layer for layer in layers if next(layer.parameters(), None) is not None), None)
    if isinstance(first, nn.Embedding | nn.EmbeddingBag):
        return {_ALL: torch.int64}
    tensors = (*module.parameters(), *module.buffers())
    floats = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return {_ALL: next(floats, torch.get_default_dtype())}


def _exactly(item: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return `item` in a dtype that holds all its whole numbers, and is wide enough for the others."""
    source = _wide(item)
    result = source.to(dtype)
    misfits = _misfits(source, result)
    if bool(misfits.any()):
        raise _misfit(source[misfits].flatten()[0].item(), dtype)
    if isinstance(item, list | tuple | int | float | Decimal) and source.is_floating_point():
        _check_whole_numbers(item, source, dtype)
    return result


def _flattened(items: Sequence[Any]) -> tuple[Sequence[Any], list[int]]:
    """Return the numbers in nested lists, none where depths or lengths are unlike, and their shape."""
    shape = [len(items)]
    while set(map(type, items)) in ({list}, {tuple}, {list, tuple}):
        lengths = set(map(len, items))
        if len(lengths) > 1:
            return [], shape
        shape += lengths
        items = list(itertools.chain.from_iterable(items))
    return items, shape


def _holds_integers(numbers: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether all are so small that the integers among them are exact, as doubles and in `dtype`."""
    eps = torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps
    # Not the first one beyond either: the next integer is rounded to it.
    return not bool((numbers.abs() >= 2 / eps).any())


def _wide(item: Any) -> torch.Tensor:
    """Return numbers as they are; of Python's, floats as doubles, and integers beyond int64 too."""
    if isinstance(item, torch.Tensor | np.ndarray | np.generic):
        return torch.as_tensor(item)
    try:
        numbers = torch.as_tensor(item)
    except (ValueError, RuntimeError) as error:
        if "Overflow" not in str(error) and "Decimal" not in str(error):
            raise
        return torch.as_tensor(_floats(item), dtype=torch.float64)
    return torch.as_tensor(item, dtype=torch.float64) if numbers.is_floating_point() else numbers


def _misfits(source: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    if result.dtype.is_complex or (source.is_floating_point() and result.is_floating_point()):
        return result.isinf() & source.isfinite()
    if source.dtype == result.dtype or source.dtype == torch.bool:
        return torch.zeros_like(source, dtype=torch.bool)
    lost = result.to(source.dtype) != source
    # The largest integer is rounded up in the comparison.
    return lost | (source >= 2.0**63) if source.is_floating_point() else lost


def _check_whole_numbers(item: Any, source: torch.Tensor, dtype: torch.dtype) -> None:
    """Fail where an integer of Python beside fractions is rounded: `source` holds it as a double already."""
    if not dtype.is_floating_point or _holds_integers(source, dtype):
        return
    for number in _numbers(item):
        is_whole = type(number) is int or (isinstance(number, Decimal) and number % 1 == 0)
        if is_whole and torch.tensor(float(number), dtype=torch.float64).to(dtype).item() != number:
            raise _misfit(number, dtype)


def _numbers(item: Any) -> Iterator[Any]:
    if isinstance(item, list | tuple):
        for entry in item:
            yield from _numbers(entry)
    else:
        yield item


def _floats(item: Any) -> Any:
    return [_floats(entry) for entry in item] if isinstance(item, list | tuple) else float(item)


def _misfit(number: object, dtype: torch.dtype) -> ValueError:
    name = str(dtype).removeprefix("torch.")
    return ValueError(f"{number} does not fit into {name}: choose another dtype with --input-dtype")
