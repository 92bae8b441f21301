"""From records to model arguments, and from model outputs to columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .._verbs.batch import arguments
from ..errors import JobError
from .dtypes import InputDtypes
from .records import Columns, Records


@dataclasses.dataclass(frozen=True)
class Steps:
    """The three functions around the model.

    Attributes:
        preprocess: values of some records -> one item each. Must be importable to run in processes.
        collate: items of one batch -> what the model is called with, see `arguments_of`.
        postprocess: output of one batch -> columns, or one entry per record.
        cost: item -> its length; batches are made of items of similar length.
        finish: output and items of one batch -> what `postprocess` gets; None leaves the output as it is.
        takes_positions: whether `collate` also gets the records' positions in the input.
        counted: column with the number of tokens that were made for each record.
    """

    preprocess: Callable[[Sequence[Any]], list[Any]]
    collate: Callable[..., Any]
    postprocess: Callable[[Any], Any]
    cost: Callable[[Any], int]
    finish: Callable[[Any, Sequence[Any]], Any] | None = None
    takes_positions: bool = False
    counted: str | None = None

    def costs(self, items: Sequence[Any]) -> list[int]:
        """Return the length of every item."""
        if self.cost is length_of and set(map(type, items)) <= {list, str}:
            return list(map(len, items))
        return list(map(self.cost, items))

    @property
    def pads(self) -> bool:
        """Whether the items of a batch may be padded to the longest one; stacking them never does."""
        return not isinstance(self.collate, Stack)


@dataclasses.dataclass(frozen=True)
class EachValue:
    """A function of one value as a function of many; worker processes can import it."""

    function: Callable[[Any], Any]

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """Apply the function to every value."""
        if self.function is same:
            return list(values)
        return [self.function(value) for value in values]


def same(value: Any) -> Any:
    """Return the argument: the step that does nothing."""
    return value


def image_to_tensor(image: Any) -> torch.Tensor:
    """Turn a PIL image into a float tensor [3, height, width] with entries from 0 to 1."""
    # By numpy, and contiguous: tensors of permuted dimensions take longer to make, and again to stack.
    entries = np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).astype(np.float32, order="C")
    entries /= np.float32(255)
    return torch.from_numpy(entries)


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that a collated batch stands for.

    A mapping of any class, such as a tokenizer's `BatchEncoding`, holds keyword arguments.
    """
    return arguments(dict(batch) if isinstance(batch, Mapping) else batch)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Stacks numbers and arrays into one tensor, dicts entry by entry; texts stay a list.

    A batch whose records differ is refused, so that it is halved and none gets its dtype from a neighbour.
    """

    dtypes: InputDtypes = InputDtypes()  # noqa: RUF009  frozen

    def __call__(self, items: Sequence[Any]) -> Any:
        """Collate the items of one batch.

        Raises:
            ValueError: the items differ in shape, dtype or names, or are no numbers.
        """
        if isinstance(items[0], str | bytes):
            return (list(items),)
        return self._stacked(items, "")

    def _stacked(self, items: Sequence[Any], name: str) -> Any:
        first = items[0]
        if isinstance(first, Mapping):
            if any(not isinstance(item, Mapping) or item.keys() != first.keys() for item in items):
                raise ValueError("the records of a batch differ in their names")
            return {key: self._stacked([item[key] for item in items], name or key) for key in first}
        if isinstance(first, str | bytes):
            return list(items)
        try:
            together = self.dtypes.stacked(items, name)
            if together is not None:
                return together
            tensors = [self.dtypes.tensor(item, name) for item in items]
            if len({tensor.dtype for tensor in tensors}) > 1:
                raise ValueError("they differ in dtype")
            return torch.stack(tensors)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            what = f"input {name!r}: " if name else ""
            raise ValueError(
                f"{what}the records of a batch do not stack into one tensor ({error})"
            ) from error


default_collate = Stack()


def length_of(item: Any) -> int:
    """Return how long an item is: characters, tokens, or entries along the first dimension."""
    if isinstance(item, Mapping):
        return max((length_of(value) for value in item.values()), default=1)
    shape = getattr(item, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else 1
    return len(item) if isinstance(item, Sequence) else 1


def to_columns(output: Any, num_records: int) -> Columns:
    """Turn the output of one batch into named columns.

    Args:
        output: a tensor or array, a mapping or named tuple of them, a tuple of them (`output_0`,
            ...), or a list with an entry per record, where dicts give one column per key.
        num_records: number of records in the batch.

    Raises:
        JobError: an entry does not have one row per record, or is named `id`.
    """
    columns = {str(name): _column(values) for name, values in _named(output).items()}
    for name, values in columns.items():
        length = len(values) if isinstance(values, list) or np.ndim(values) else None
        if length != num_records:
            found = "no" if length is None else length
            raise JobError(
                f"Output {name!r} has {found} rows for {num_records} records",
                "The model, or --postprocess, must give one row per record along the first dimension.",
            )
    if "id" in columns or not columns:
        raise JobError(
            "The outputs have a column named 'id'" if columns else "The model gives no output",
            "Return other columns, or change them with --postprocess.",
        )
    return columns


def with_kept(
    columns: Columns, records: Records, keep: Sequence[str], new_names: Mapping[str, str]
) -> Columns:
    """Add the columns that are copied from the input, and rename what is to be renamed.

    Raises:
        JobError: two columns have the same name, or none has a name that is to be changed.
    """
    kept = {name: _kept(records.kept[name]) for name in keep}
    named = [*kept.items(), *columns.items()]
    for old in new_names.keys() - kept.keys() - columns.keys():
        listed = ", ".join(map(repr, (*kept, *columns)))
        raise JobError(f"There is no column {old!r} to rename", f"The output has {listed}.")
    # Where both have the name, that of the input is meant, which makes room for the other.
    names = [new_names.get(name, name) for name in kept]
    names += [name if name in kept else new_names.get(name, name) for name in columns]
    for name in names:
        if names.count(name) > 1 or name == "id":
            raise JobError(
                f"The output would have two columns {name!r}", "Give one another name: --rename old=new."
            )
    return dict(zip(names, (values for _, values in named), strict=True))


def check_texts(columns: Columns) -> None:
    """Fail where a text is no valid Unicode, which no file can hold.

    Raises:
        ValueError: with the column; the record at fault can be found by halving the batch.
    """
    for name, values in columns.items():
        if isinstance(values, list):
            try:
                _encode(values)
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"column {name!r} of the output holds no valid Unicode text: {error}"
                ) from None


def _encode(value: Any) -> None:
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list | tuple):
        for entry in value:
            _encode(entry)
    elif isinstance(value, dict):
        for pair in value.items():
            _encode(pair)


def _kept(values: Sequence[Any]) -> Any:
    """Return entries of arrays as one array where they are of one shape and dtype, all others as a list."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        return _column(torch.stack(list(values)))
    return _column(np.stack(list(values)) if isinstance(first, np.ndarray | np.generic) else list(values))


def _named(output: Any) -> Mapping[Any, Any]:
    if isinstance(output, Mapping):
        return output
    if hasattr(output, "_asdict"):
        return dict(output._asdict())
    if isinstance(output, tuple):
        return {f"output_{index}": values for index, values in enumerate(output)}
    if isinstance(output, list) and output and all(isinstance(entry, Mapping) for entry in output):
        names = dict.fromkeys(name for entry in output for name in entry)
        return {name: [entry.get(name) for entry in output] for name in names}
    return {"output": output}


def _column(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if isinstance(values, list):
        return values
    array = np.asarray(values)
    # An array of texts is as wide as the longest of its batch, so its dtype differs from batch to batch.
    return array.tolist() if array.ndim and array.dtype.kind in "OSTU" else array
