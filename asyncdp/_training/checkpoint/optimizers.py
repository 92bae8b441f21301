"""The state of an optimizer, by the names of its parameters instead of their numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointMismatchError
from .entries import Entries, some_of

# How an optimizer computes is its own affair, and depends on the device; names are as its groups have them.
_OWN_OPTIONS = ("foreach", "fused", "capturable", "param_names", "params")


def _parameter_names(module: nn.Module, optimizer: Any) -> list[list[str]]:
    """Return the name of every parameter of an optimizer; those that are not the module's have a number."""
    names = {id(each): name for name, each in module.named_parameters()}
    groups, count, found = optimizer.param_groups, 0, []
    for group in groups:
        found.append([names.get(id(each), f"#{count + place}") for place, each in enumerate(group["params"])])
        count += len(group["params"])
    return found


def _is_regular(optimizer: Any, state: Any) -> bool:
    """Return whether a state is as torch's optimizers have it: by parameter and name."""
    try:
        sizes = [len(group["params"]) for group in state["param_groups"]]
        return (
            sizes == [len(group["params"]) for group in optimizer.param_groups]
            and all(isinstance(index, int) for group in state["param_groups"] for index in group["params"])
            and all(isinstance(index, int) for index in state["state"])
            and all(isinstance(key, str) for values in state["state"].values() for key in values)
        )
    except (AttributeError, KeyError, TypeError):
        return False


def optimizer_entries(module: nn.Module, optimizer: Any) -> Entries:
    """Return the state of an optimizer under paths; in one piece, if it is not as those of torch have it."""
    state = optimizer.state_dict()
    if not _is_regular(optimizer, state):
        return {("optimizer",): state}
    names = _parameter_names(module, optimizer)
    groups = state["param_groups"]
    by_index = _by_index(groups, names)
    entries: Entries = {("optimizer", key): value for key, value in state.items() if key != "state"}
    entries["optimizer", "param_groups"] = [
        {**group, "params": own} for group, own in zip(groups, names, strict=True)
    ]
    for index, values in state["state"].items():
        for key, value in values.items():
            entries["optimizer", "state", by_index[index], key] = value
    return entries


def _by_index(groups: Iterable[Any], names: Iterable[Sequence[str]]) -> dict[int, str]:
    pairs = [zip(group["params"], own, strict=True) for group, own in zip(groups, names, strict=True)]
    return {index: name for each in pairs for index, name in each}


def optimizer_state(path: Path, module: nn.Module, optimizer: Any, entries: Entries) -> Any:
    """Return the state for an optimizer, by the numbers that its parameters have there.

    Raises:
        CheckpointMismatchError: it has other parameters.
    """
    if ("optimizer",) in entries:
        return entries["optimizer",]
    groups, saved = optimizer.state_dict()["param_groups"], entries["optimizer", "param_groups"]
    names = _parameter_names(module, optimizer)
    _check_groups(path, [each["params"] for each in saved], names)
    index_of = {name: index for index, name in _by_index(groups, names).items()}
    state: dict[int, dict[str, Any]] = {}
    rest = {}
    for each, value in entries.items():
        if each[:2] == ("optimizer", "state"):
            state.setdefault(index_of[each[2]], {})[each[3]] = value
        elif each[0] == "optimizer":
            rest[each[1]] = value
    rest["param_groups"] = [_group(mine, other) for mine, other in zip(groups, saved, strict=True)]
    return {**rest, "state": state}


def _group(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    group = {**saved, **{key: mine[key] for key in _OWN_OPTIONS if key in mine}}
    for key, value in group.items():
        if isinstance(value, Tensor) and isinstance(mine.get(key), Tensor):  # a learning rate, say
            group[key] = value.to(mine[key].device)
    return group


def _check_groups(path: Path, saved: Sequence[Collection[str]], now: Sequence[Collection[str]]) -> None:
    remedy = "Make the optimizer as the saved one was, over the same parameters."
    if len(saved) != len(now):
        cause = f"its optimizer has {len(saved)} groups of parameters, and that given here {len(now)}"
        raise CheckpointMismatchError(path, cause, remedy)
    for place, (theirs, mine) in enumerate(zip(saved, now, strict=True)):
        differing = sorted({*theirs} ^ {*mine})
        if differing:
            cause = f"group {place} of only one of the two optimizers has {some_of(differing)}"
            raise CheckpointMismatchError(path, cause, remedy)
