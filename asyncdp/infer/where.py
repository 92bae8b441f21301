"""Which records a job is about: `--where`, `--sample` and `--limit`."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, JobUsageError
from .records import Records


@dataclasses.dataclass(frozen=True)
class Where:
    """A condition on the columns of a record.

    Attributes:
        text: as it was given.
        columns: names of the columns that it asks of.
        expression: of pyarrow.
    """

    text: str
    columns: tuple[str, ...]
    expression: Any

    @classmethod
    def of(cls, text: str) -> Where:
        """Read a condition such as `price > 3 and lang in ["de", "fr"]`, or one of pyarrow's with `pc.field`.

        Raises:
            JobUsageError: it is no condition; what it could do is what Arrow's functions of one row can.
        """
        reader = _Expression()
        try:
            expression = reader.read(ast.parse(text.strip(), mode="eval").body)
            columns = tuple(reader.columns)
            if not columns:
                raise ValueError("it asks of no column")
        except Exception as error:
            raise JobUsageError(
                f"--where {text} cannot be read: {error}",
                "Write it as in Python, with names of columns: price > 3 and lang in ['de', 'fr'].",
            ) from error
        return cls(text, columns, expression)

    def mask(self, table: Any) -> Any:
        """Return an array with true for the rows of a table that fulfil it; null counts as false."""
        import pyarrow.compute
        import pyarrow.dataset

        answers = pyarrow.dataset.InMemoryDataset(table).to_table(columns={"is": self.expression})["is"]
        return pyarrow.compute.fill_null(answers.cast("bool").combine_chunks(), False)

    def of_table(self, table: Any) -> list[bool | Exception]:
        """Return for each row of a table whether it fulfils the condition, or why that cannot be told."""
        try:
            found: list[bool | Exception] = self.mask(table).to_pylist()
            return found
        except (
            Exception
        ) as error:  # of any type that Arrow raises for values that it cannot convert or compare
            if table.num_rows > 1:
                return [
                    answer
                    for index in range(table.num_rows)
                    for answer in self.of_table(table[index : index + 1])
                ]
            return [self._inapplicable(error)]

    def of_records(self, records: Sequence[Mapping[str, Any]]) -> list[bool | Exception]:
        """Return for each record whether it fulfils the condition, or why that cannot be told.

        Records whose values are of the same types are looked at together, so that none gets its types from
        another.
        """
        groups: dict[tuple[type, ...], list[int]] = defaultdict(list)
        plain = [{name: _plain(record.get(name)) for name in self.columns} for record in records]
        for index, record in enumerate(plain):
            groups[tuple(type(record[name]) for name in self.columns)].append(index)
        answers: dict[int, bool | Exception] = {}
        for indices in groups.values():
            answers.update(zip(indices, self._of_alike([plain[index] for index in indices]), strict=True))
        return [answers[index] for index in range(len(records))]

    def _of_alike(self, records: Sequence[Mapping[str, Any]]) -> list[bool | Exception]:
        import pyarrow

        try:
            columns = {name: pyarrow.array([record[name] for record in records]) for name in self.columns}
        except Exception as error:
            if len(records) > 1:
                return [answer for record in records for answer in self._of_alike([record])]
            return [self._inapplicable(error)]
        return self.of_table(pyarrow.table(columns))

    def _inapplicable(self, error: Exception) -> ValueError:
        why = f"--where {self.text} cannot be applied: {error}"
        return ValueError(f"{why} (convert a column as in cast(price, 'float64'))")

    def check_fit(self, schema: Any, name: str) -> None:
        """Fail where columns are of types that the condition cannot compare.

        Args:
            schema: of Arrow.
            name: that of the file.

        Raises:
            InputError: with what does not fit.
        """
        if not set(self.columns) <= set(schema.names):
            return
        try:
            self.mask(schema.empty_table().select(list(self.columns)))
        except Exception as error:
            raise InputError(
                f"--where {self.text} does not fit {name}: {error}",
                "Compare columns with values of their type, or convert them: cast(price, 'float64').",
            ) from error


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which records of the input a job is about.

    Attributes:
        where: a condition that they fulfil.
        sample: a share of them below 1, or a number of them.
        seed: which sample.
        limit: most records, the first ones.
    """

    where: Where | None = None
    sample: float | None = None
    seed: int = 0
    limit: int | None = None

    @property
    def chooses(self) -> bool:
        """Whether records are left out by what they are, and not by where they end."""
        return self.where is not None or self.sample is not None


class Sample:
    """A sample of positions that depends on nothing but a seed, so that parts and resumed jobs agree on it.

    Args:
        size: a share of the positions, below 1, or a number of them.
        seed: which sample.
        total: number of positions, needed for a number of them.
    """

    def __init__(self, size: float, seed: int, total: int | None = None) -> None:
        self._seed = seed
        if size < 1:
            self._last = np.uint64(int(size * 2**64) - 1)
        elif not total or size >= total:
            self._last = np.uint64(2**64 - 1)
        else:
            # No two positions have the same hash.
            self._last = np.partition(self._hashes(0, total), int(size) - 1)[int(size) - 1]

    def of(self, records: Records) -> Records:
        """Return those of some records that are in it."""
        start = records.span.start
        held = self._hashes(start, records.span.stop) <= self._last
        places = np.asarray(records.positions, np.int64) - start
        return records.pick(np.flatnonzero(held[places]).tolist())

    def _hashes(self, start: int, stop: int) -> Any:
        """Return numbers that look random, one for each position: splitmix64."""
        golden = 0x9E3779B97F4A7C15
        first = np.uint64(self._seed * 0xD1B54A32D192ED03 % 2**64)
        with np.errstate(over="ignore"):
            x = first + np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(golden)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return x ^ (x >> np.uint64(31))


def _plain(value: Any) -> Any:
    return value.item() if getattr(value, "ndim", None) == 0 else value


_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_METHODS = ("isin", "is_null", "is_valid", "is_nan", "cast")
_LITERALS = {
    "date": datetime.date.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "timestamp": datetime.datetime.fromisoformat,
}


class _Expression:
    """Makes an expression of pyarrow from Python's syntax; nothing of it is run."""

    def __init__(self) -> None:
        import pyarrow.compute

        self._compute = pyarrow.compute
        self.columns: dict[str, None] = {}

    def read(self, node: ast.AST) -> Any:
        """Return the value of a node: an expression, or a constant.

        Raises:
            ValueError: it is none that conditions are made of.
        """
        for kind, read in self._readers.items():
            if isinstance(node, kind):
                return read(self, node)
        raise ValueError(f"there is no place for {ast.unparse(node)}")

    def _name(self, node: ast.Name) -> Any:
        return self._field(node.id)

    def _field(self, *names: Any) -> Any:
        self.columns[str(names[0])] = None
        return self._compute.field(*names)

    def _constant(self, node: ast.Constant) -> Any:
        return node.value

    def _list(self, node: Any) -> list[Any]:
        return [self.read(entry) for entry in node.elts]

    def _both(self, node: ast.BoolOp) -> Any:
        join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        return functools.reduce(join, [self.read(value) for value in node.values])

    def _unary(self, node: ast.UnaryOp) -> Any:
        value = self.read(node.operand)
        if isinstance(node.op, ast.USub):
            return -value if isinstance(value, int | float) else self._compute.negate(value)
        if isinstance(node.op, ast.Not | ast.Invert):
            return ~value
        raise ValueError(f"there is no place for {ast.unparse(node)}")

    def _binary(self, node: ast.BinOp) -> Any:
        if type(node.op) not in _BINARY:
            raise ValueError(f"there is no place for {ast.unparse(node)}")
        return _BINARY[type(node.op)](self.read(node.left), self.read(node.right))

    def _compare(self, node: ast.Compare) -> Any:
        values = [self.read(value) for value in (node.left, *node.comparators)]
        pairs = zip(node.ops, values, values[1:], strict=False)
        return functools.reduce(operator.and_, [self._pair(op, left, right) for op, left, right in pairs])

    def _pair(self, op: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(op, ast.In | ast.NotIn):
            found = left.isin(right)
            return found if isinstance(op, ast.In) else ~found
        if isinstance(op, ast.Is | ast.IsNot):
            if right is not None:
                raise ValueError("`is` goes with None alone")
            return left.is_null() if isinstance(op, ast.Is) else left.is_valid()
        return _BINARY[type(op)](left, right)

    def _call(self, node: ast.Call) -> Any:
        args = [self.read(value) for value in node.args]
        options = {str(keyword.arg): self.read(keyword.value) for keyword in node.keywords}
        if isinstance(node.func, ast.Name):
            return self._function(node.func.id, args, options)
        if isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name) and node.func.value.id in ("pc", "ds", "pyarrow"):
                return self._function(node.func.attr, args, options)
            if node.func.attr in _METHODS:
                return getattr(self.read(node.func.value), node.func.attr)(*args, **options)
        raise ValueError(f"there is no function {ast.unparse(node.func)}")

    def _function(self, name: str, args: list[Any], options: dict[str, Any]) -> Any:
        if name == "field":
            return self._field(*args)
        if name == "scalar":
            return self._compute.scalar(*args)
        if name == "cast":
            return args[0].cast(*args[1:], **options)
        if name in _LITERALS:
            return self._compute.scalar(_LITERALS[name](*args))
        if name not in self._compute.list_functions() or self._compute.get_function(name).kind != "scalar":
            raise ValueError(f"there is no function {name} of one row in pyarrow.compute")
        return getattr(self._compute, name)(*args, **options)

    _readers: Mapping[type[ast.AST], Callable[..., Any]] = {
        ast.Name: _name,
        ast.Constant: _constant,
        ast.List: _list,
        ast.Tuple: _list,
        ast.Set: _list,
        ast.BoolOp: _both,
        ast.UnaryOp: _unary,
        ast.BinOp: _binary,
        ast.Compare: _compare,
        ast.Call: _call,
    }
