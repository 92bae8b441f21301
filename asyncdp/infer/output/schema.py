"""The columns of a job: those of all its shards, widened as later records need it."""

from __future__ import annotations

from typing import Any

from ...errors import JobError
from ..blocks import OBJECTS, merged

_REMEDY = (
    "Return values of one type with --postprocess, None where there is none, or write --output-format jsonl."
)


def described(schema: Any, fixed: dict[str, str]) -> dict[str, str]:
    """Return what the journal says of a schema of Arrow.

    Args:
        schema: of a whole shard, with the ids.
        fixed: type and shape of the columns that are arrays.
    """
    kinds = {field.name: f"{OBJECTS} {field.type}" for field in schema if field.name != "id"}
    return {name: fixed.get(name, kind) for name, kind in kinds.items()}


def unify(before: Any, now: Any, where: str) -> Any:
    """Return the narrowest schema of Arrow that holds the shards before and a new one.

    Args:
        before: of the shards before, None for the first.
        now: of the new one.
        where: the records of the new one, for a person to find them.

    Raises:
        JobError: the values of a column have no common type; with its name and both types.
    """
    import pyarrow

    old, new = {field.name: field for field in before or ()}, {field.name: field for field in now}
    fields = merged(_without_id(old), _without_id(new))
    for name, field in {"id": new["id"], **fields}.items():
        known = old.get(name, field)
        if known.type == field.type:
            fields[name] = field
            continue
        pair = [pyarrow.schema([known]), pyarrow.schema([field])]
        try:
            (wide,) = pyarrow.unify_schemas(pair, promote_options="permissive")
            fields[name] = pyarrow.field(name, _normal(wide.type, in_order=True))
        except pyarrow.ArrowException:
            raise JobError(
                f"The outputs differ between shards: column {name!r} is {known.type}, "
                f"then {field.type} in {where}",
                _REMEDY,
            ) from None
    return pyarrow.schema([fields.pop("id"), *fields.values()])


def conform(table: Any, schema: Any, where: str) -> Any:
    """Return a table with the columns and types of a wider schema.

    Raises:
        JobError: a value, such as an integer beside fractions, does not fit the wider type.
    """
    import pyarrow

    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pyarrow.nulls(table.num_rows, field.type))
            continue
        column = table[field.name]
        try:
            columns.append(column if str(column.type) == str(field.type) else _cast(column, field.type))
        except (pyarrow.ArrowException, OverflowError) as error:
            raise JobError(
                f"Column {field.name!r} in {where} does not fit into {field.type}, "
                f"which the other shards need: {error}",
                _REMEDY,
            ) from error
    return pyarrow.table(columns, schema=schema)


def common_names(schema: Any) -> Any:
    """Return the schema of a file with the names that Arrow gives, and without the file's notes."""
    import pyarrow

    return pyarrow.schema([(field.name, _normal(field.type)) for field in schema])


def _without_id(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: field for name, field in fields.items() if name != "id"}


def _normal(kind: Any, *, in_order: bool = False) -> Any:
    """Return a type with the names that Arrow gives to the entries of lists; files have others.

    Args:
        kind: a type of Arrow.
        in_order: whether the fields of structs are sorted by name.
    """
    import pyarrow
    from pyarrow import types

    if types.is_struct(kind):
        fields = [(field.name, _normal(field.type, in_order=in_order)) for field in kind]
        return pyarrow.struct(sorted(fields, key=lambda field: field[0]) if in_order else fields)
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(_normal(kind.value_type, in_order=in_order), kind.list_size)
    if types.is_list(kind):
        return pyarrow.list_(_normal(kind.value_type, in_order=in_order))
    if types.is_large_list(kind):
        return pyarrow.large_list(_normal(kind.value_type, in_order=in_order))
    return kind


def _cast(column: Any, kind: Any) -> Any:
    import pyarrow

    try:
        return column.cast(kind)
    except pyarrow.ArrowNotImplementedError:
        return pyarrow.chunked_array([pyarrow.array(column.to_pylist(), kind)], kind)
