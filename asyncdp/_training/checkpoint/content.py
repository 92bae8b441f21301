"""What of a module, its optimizer and their helpers goes into a checkpoint, and back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import shown
from ...errors import CheckpointMismatchError, NotAnOptimizerError, NotASchedulerError
from .entries import Entries, Kind, Path_, kind_of, some_of
from .optimizers import optimizer_entries, optimizer_state

_VERSIONS = ("module_versions",)


class Content:
    """The objects whose state a checkpoint holds.

    Args:
        module: always part of it.
        optimizer: of torch.optim, or anything with `state_dict` and `load_state_dict`; None for none.
        scheduler: likewise.
        scaler: likewise.
    """

    def __init__(self, module: nn.Module, optimizer: Any, scheduler: Any, scaler: Any) -> None:
        self.module = module
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        if optimizer is not None and not _has_state(optimizer):
            raise NotAnOptimizerError(optimizer)
        if scheduler is not None and (
            not _has_state(scheduler) or isinstance(scheduler, torch.optim.Optimizer)
        ):
            raise NotASchedulerError(scheduler)
        if scaler is not None and not (_has_state(scaler) and hasattr(scaler, "scale")):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, but got {shown(scaler)}.")

    @property
    def _helpers(self) -> dict[str, Any]:
        named = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {name: each for name, each in named.items() if each is not None}

    def class_names(self) -> dict[str, str]:
        """Return the name of the class of each of them."""
        return {
            name: type(each).__qualname__ for name, each in [("module", self.module), *self._helpers.items()]
        }

    def collect(self) -> Entries:
        """Return a copy of all state, on the CPU; nothing may change it meanwhile."""
        state = self.module.state_dict()
        entries: Entries = {("module", name): value for name, value in state.items()}
        entries[_VERSIONS] = dict(getattr(state, "_metadata", {}))
        if self.optimizer is not None:
            entries |= optimizer_entries(self.module, self.optimizer)
        for name, each in self._helpers.items():
            if name != "optimizer":
                entries[(name,)] = each.state_dict()
        memo: dict[int, Any] = {}
        return {path: _to_cpu(value, memo) for path, value in entries.items()}

    def choose(self, path: Path, kinds: Mapping[Path_, Kind | None], about: Mapping[str, Any]) -> list[Path_]:
        """Return what has to be read of a checkpoint.

        Args:
            path: of the checkpoint, for messages.
            kinds: what it holds.
            about: its manifest.

        Raises:
            CheckpointMismatchError: it does not hold what it should, or of another kind.
        """
        saved = {each[1]: kind for each, kind in kinds.items() if each[0] == "module"}
        _check_module(path, saved, self.module.state_dict())
        names = about.get("classes", {})
        for name, each in self._helpers.items():
            kind = type(each).__qualname__
            if name not in names:
                remedy = f"Load it without {name}=, or save one with it."
                raise CheckpointMismatchError(path, f"it holds no {name}", remedy)
            if names[name] != kind:
                cause = f"its {name} is of the class {names[name]}, and that given here of {kind}"
                raise CheckpointMismatchError(
                    path, cause, f"Load it with one of {names[name]}, or without {name}=."
                )
        needed = {"module", *_VERSIONS, *self._helpers}
        return [each for each in kinds if each[0] in needed]

    def prepare(self, path: Path, entries: Entries) -> Loading:
        """Return what loads the entries of a checkpoint; nothing has changed yet.

        Raises:
            CheckpointMismatchError: the optimizer has other parameters.
        """
        state: OrderedDict[str, Any] = OrderedDict(
            (each[1], value) for each, value in entries.items() if each[0] == "module"
        )
        state._metadata = entries[_VERSIONS]  # type: ignore[attr-defined]
        helpers = []
        for name, each in self._helpers.items():
            if name == "optimizer":
                helpers.append((each, optimizer_state(path, self.module, each, entries)))
            else:
                helpers.append((each, entries[(name,)]))
        return Loading(self.module, state, helpers)

    def clear_gradients(self) -> None:
        """Set all gradients to None."""
        groups = getattr(self.optimizer, "param_groups", ())
        for tensor in (*self.module.parameters(), *(each for group in groups for each in group["params"])):
            tensor.grad = None


class Loading:
    """States on their way into a module and its helpers: all of them or none.

    Args:
        module: the module.
        state: its new state.
        helpers: objects and their new states.
    """

    def __init__(
        self, module: nn.Module, state: Mapping[str, Any], helpers: Sequence[tuple[Any, Any]]
    ) -> None:
        self._module = module
        self._state = state
        self._helpers = helpers

    def run(self) -> Callable[[BaseException], None]:
        """Load all, or raise and have changed nothing; return what puts all back because of an error."""
        undo: list[Callable[[], object]] = []

        def put_back(error: BaseException) -> None:
            for function in reversed(undo):
                try:
                    function()
                except Exception as other:
                    error.add_note(f"putting back what was there before failed too: {other!r}")

        try:
            for each, state in self._helpers:
                undo.append(_undo_of(each))
                each.load_state_dict(state)
            undo += _undo_of_module(self._module)
            self._module.load_state_dict(self._state)
        except BaseException as error:
            put_back(error)
            raise
        return put_back


def _undo_of(helper: Any) -> Callable[[], object]:
    # Those of torch replace what they hold, so that the tensors need no copies.
    before = helper.state_dict()
    before = before if isinstance(helper, torch.optim.Optimizer) else copy.deepcopy(before)
    return lambda: helper.load_state_dict(before)


def _undo_of_module(module: nn.Module) -> list[Callable[[], object]]:
    """Return what puts back the tensors of a module, and what submodules keep beside them."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    untouched = nn.Module.set_extra_state
    holders = [each for each in module.modules() if type(each).set_extra_state is not untouched]

    def put_back_tensors() -> None:
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)

    extras = [partial(each.set_extra_state, copy.deepcopy(each.get_extra_state())) for each in holders]
    return [*extras, put_back_tensors]


def _has_state(each: Any) -> bool:
    return all(callable(getattr(each, name, None)) for name in ("state_dict", "load_state_dict"))


def _to_cpu(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is dict:
        return {key: _to_cpu(each, memo) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_cpu(each, memo) for each in value)
    return copy.deepcopy(value, memo)


def _check_module(path: Path, saved: Mapping[str, Kind | None], now: Mapping[str, Any]) -> None:
    remedy = "Load it into a module that was made as the saved one."
    missing, extra = [name for name in now if name not in saved], [name for name in saved if name not in now]
    if missing or extra:
        parts = [f"it has no {some_of(missing)} of the module"] if missing else []
        parts += [f"the module has no {some_of(extra)}"] if extra else []
        raise CheckpointMismatchError(path, ", and ".join(parts), remedy)
    for name, value in now.items():
        mine, other = kind_of(value), saved[name]
        if mine == other:
            continue
        if mine is None or other is None:
            cause = f"{name!r} is a tensor in one of checkpoint and module, and in the other none"
        elif mine.shape != other.shape:
            cause = f"{name!r} has the shape {[*other.shape]} in it, and {[*mine.shape]} in the module"
        else:
            cause = f"{name!r} is of {other.dtype} in it, and of {mine.dtype} in the module"
            remedy = f"Convert the module to {other.dtype}, load, and convert it back."
        raise CheckpointMismatchError(path, cause, remedy)
