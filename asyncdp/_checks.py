"""Checks of what users pass, with errors that name the argument."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping


def is_number(value: object) -> bool:
    """Return whether a value is a real number; True and False are none, though Python counts with them."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_counts(*, least: int = 1, most: float = math.inf, **counts: object) -> None:
    """Fail where an argument is no whole number from `least` to `most`.

    Raises:
        ValueError: with its name.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= most:
            allowed = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name} must be {allowed}, an int, but got {count!r}.")


def check_seconds(*, positive: bool = False, optional: bool = True, **durations: object) -> None:
    """Fail where an argument is no duration, or 0 where it must be positive.

    Args:
        positive: whether 0 is too short.
        optional: whether None is a duration without an end.
        durations: by name of the argument.

    Raises:
        ValueError: with its name.
    """
    wanted = "more than 0" if positive else "not negative"
    for name, seconds in durations.items():
        if seconds is None and optional:
            continue
        length = float(seconds) if is_number(seconds) else math.nan  # type: ignore[arg-type]
        if not (length > 0 if positive else length >= 0):
            raise ValueError(f"{name} is in seconds and {wanted}, but got {seconds!r}.")


def check_dim(dim: object) -> None:
    """Fail where the number of a dimension is no whole number.

    Raises:
        TypeError: with what it is.
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be a whole number, but got {dim!r}. 0 splits along the first dimension.")


def check_list(name: str, given: object, *, sized: bool = False) -> None:
    """Fail where an argument is nothing like a list: not iterable, a text, a dict, a tensor.

    Args:
        name: of the argument.
        given: its value.
        sized: whether it must know how many entries it has.

    Raises:
        TypeError: with the name.
    """
    is_one = isinstance(given, (str, bytes, Mapping)) or hasattr(given, "__array__")
    if is_one or not hasattr(given, "__iter__") or (sized and not hasattr(given, "__len__")):
        kind = type(given).__qualname__
        raise TypeError(f"{name} must be a list or a tuple, but got {kind}. Put it in a list.")


def check_flags(**flags: object) -> None:
    """Fail where an argument is neither True nor False.

    Raises:
        TypeError: with its name.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, but got {flag!r}.")


def check_functions(*, optional: bool = False, **functions: object) -> None:
    """Fail where an argument cannot be called; None is no function where it is optional.

    Raises:
        TypeError: with its name.
    """
    for name, function in functions.items():
        if not callable(function) and not (function is None and optional):
            raise TypeError(f"{name} must be a function, but got {function!r}.")
