"""Values of Arrow that Python cannot hold, and what text becomes of values that JSON has no word for."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from typing import Any

import numpy as np

_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}


def is_arrow(value: object) -> bool:
    """Return whether a value is still Arrow's own."""
    return type(value).__module__.startswith("pyarrow")


def as_python(scalar: Any) -> Any:
    """Return what a scalar of Arrow holds: NumPy's scalar for times that Python cannot hold.

    All times in nanoseconds become NumPy's, so that a column's values are of one type. Times with a zone
    are then in UTC; a time of day is the time since midnight.

    Raises:
        ValueError: the value is damaged, such as text that is no UTF-8.
    """
    import pyarrow.types as types

    kind = scalar.type
    if not scalar.is_valid:
        return None
    if types.is_struct(kind):
        return {field.name: as_python(scalar[index]) for index, field in enumerate(kind)}
    if types.is_map(kind):
        return [(as_python(pair[0]), as_python(pair[1])) for pair in scalar.values]
    if types.is_nested(kind) and hasattr(scalar, "values"):
        return [as_python(entry) for entry in scalar.values]
    if _is_time(kind) and getattr(kind, "unit", None) == "ns":
        return _numpy_time(scalar)
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        if not _is_time(kind):
            raise
        return _numpy_time(scalar)


def holds_nanoseconds(kind: Any) -> bool:
    """Return whether a type of Arrow holds times in nanoseconds, at any depth."""
    if _is_time(kind):
        return getattr(kind, "unit", None) == "ns"
    return any(holds_nanoseconds(kind.field(index).type) for index in range(kind.num_fields))


def is_id(kind: Any) -> bool:
    """Return whether ids of a type of Arrow are stored as they are; texts and integers become text."""
    import pyarrow.types as types

    return _is_time(kind) or types.is_decimal(kind)


def as_json(value: Any) -> Any:
    """Return what JSON can hold of a value, for `json.dumps(default=...)`: ISO text for times.

    Raises:
        TypeError: JSON has nothing like it.
    """
    if is_arrow(value):
        return as_python(value)
    if isinstance(value, np.ndarray):
        return list(value) if value.dtype.kind in "mM" else value.tolist()
    if isinstance(value, np.datetime64 | np.timedelta64):
        return _iso_of_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return _iso_duration(value // datetime.timedelta(microseconds=1), 6)
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"JSON cannot hold {type(value).__name__}")


def json_text(value: Any) -> str:
    """Return a value as JSON, which has no word for NaN and infinity: they are null.

    Raises:
        TypeError: JSON has nothing like it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, default=as_json, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=as_json, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "mM":
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(identity: Any) -> str | int:
    """Return an id as text where it is neither text nor a number of Python."""
    if isinstance(identity, str | int):
        return identity
    zone = getattr(getattr(identity, "type", None), "tz", None)
    value = as_python(identity) if is_arrow(identity) else identity
    text = str(value if isinstance(value, str | int) else as_json(value))
    return f"{text}Z" if zone and isinstance(value, np.datetime64) else text


def _is_time(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_temporal(kind)) and not types.is_interval(kind)


def _numpy_time(scalar: Any) -> np.datetime64 | np.timedelta64:
    import pyarrow.types as types

    kind, value = scalar.type, scalar.value
    if types.is_date32(kind):
        return np.datetime64(value, "D")
    if types.is_date64(kind):
        return np.datetime64(value, "ms")
    if types.is_timestamp(kind):
        return np.datetime64(value, kind.unit)
    return np.timedelta64(value, kind.unit)


def _iso_of_numpy(value: np.datetime64 | np.timedelta64) -> str | None:
    if np.isnat(value):
        return None
    if isinstance(value, np.datetime64):
        # NumPy writes years as short as they are; ISO has four digits, or a sign before them.
        sign, year, rest = re.fullmatch(r"(-?)(\d+)(.*)", str(value)).groups()  # type: ignore[union-attr]
        return f"{sign or ('+' if len(year) > 4 else '')}{year.zfill(4)}{rest}"
    unit = np.datetime_data(value.dtype)[0]
    if unit not in _DIGITS:
        value, unit = value.astype("timedelta64[s]"), "s"
    return _iso_duration(int(value.astype(np.int64)), _DIGITS[unit])


def _iso_duration(count: int, digits: int) -> str:
    seconds = f"{decimal.Decimal(abs(count)).scaleb(-digits):f}"
    if "." in seconds:
        seconds = seconds.rstrip("0").rstrip(".")
    return f"{'-' if count < 0 else ''}PT{seconds}S"
