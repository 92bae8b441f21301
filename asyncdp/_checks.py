"""Checks of what users pass, with errors that name the argument."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

_MAX_SHOWN = 120  # characters of a wrong argument


def is_number(value: object) -> bool:
    """Return whether a value is a real number; True and False are none, though Python counts with them."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def shown(value: object) -> str:
    """Return how an error shows a wrong argument: in few characters, and even if it cannot be shown."""
    try:
        text = repr(value)
    except Exception:  # of an int of thousands of digits, for one
        text = f"a value of type {type(value).__qualname__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]}..."


def check_counts(*, least: int = 1, most: float = math.inf, **counts: object) -> None:
    """Fail where an argument is no whole number from `least` to `most`.

    Raises:
        ValueError: with its name.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= most:
            allowed = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name} must be {allowed}, an int, but got {shown(count)}.")


def as_seconds(name: str, given: object, *, positive: bool = False) -> float:
    """Return a duration as a float; other kinds of numbers would make times less exact, or no times.

    Args:
        name: of the argument.
        given: a number.
        positive: whether 0 is too short.

    Raises:
        ValueError: with the name.
    """
    try:
        length = float(given) if is_number(given) else math.nan  # type: ignore[arg-type]
    except OverflowError:  # of whole numbers and fractions
        length = math.nan
    if not (length > 0 if positive else length >= 0):
        wanted = "more than 0" if positive else "not negative"
        raise ValueError(
            f"{name} is in seconds, a number that is {wanted}, infinity at most, but got {shown(given)}."
        )
    return length


def as_optional_seconds(name: str, given: object, *, positive: bool = False) -> float | None:
    """Return a duration as `as_seconds` does, or None, which has no end."""
    return None if given is None else as_seconds(name, given, positive=positive)


def check_dim(dim: object) -> None:
    """Fail where the number of a dimension is no whole number.

    Raises:
        TypeError: with what it is.
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(
            f"dim must be a whole number, but got {shown(dim)}. 0 splits along the first dimension."
        )


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
            raise TypeError(f"{name} must be True or False, but got {shown(flag)}.")


def check_functions(*, optional: bool = False, **functions: object) -> None:
    """Fail where an argument cannot be called; None is no function where it is optional.

    Raises:
        TypeError: with its name.
    """
    for name, function in functions.items():
        if not callable(function) and not (function is None and optional):
            raise TypeError(f"{name} must be a function, but got {shown(function)}.")
