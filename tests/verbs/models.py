"""Small modules, each with one trait that is easily lost in a replica."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from asyncdp._runtime.task import this_thread

from ..notes import Notes, Shared


class Case(NamedTuple):
    """A module and a batch for it."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    """Batches of six rows."""
    return lambda: torch.randn(6, *shape, dtype=dtype)


class Fn(nn.Module):
    """A module around a function of (module, *inputs), with parts given by name."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Tied(nn.Module):
    """Two layers that share one weight, and one layer that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        assert self.b.weight is self.a.weight
        assert self.again is self.a
        return self.again(self.b(self.a(x)))


class Listed(nn.Module):
    """Parameters in a ParameterList, a ParameterDict and a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.named = nn.ParameterDict({"scale": torch.randn(3), "shift": torch.randn(3)})
        self.plain = [self.several[0], self.named["scale"]]

    def forward(self, x: Tensor) -> Tensor:
        assert self.plain[0] is self.several[0]
        for each in self.several:
            x = x * each
        return (x + self.plain[0]) * self.named["scale"] + self.named["shift"]


class LearningBuffer(nn.Module):
    """A buffer that requires a gradient beside one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("learns", torch.randn(3, dtype=torch.float64, requires_grad=True))
        self.register_buffer("still", torch.randn(3))
        self.register_buffer("missing", None)

    def forward(self, x: Tensor) -> Tensor:
        assert self.missing is None
        return x * self.learns + self.still


class Recurrent(nn.Module):
    """An LSTM, whose weights are also in a plain list of its own."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(3, 4, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        return self.rnn(x)[0]


class Hooked(nn.Module):
    """A module that hooks a part of itself with a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.layer.register_forward_hook(self.scale)

    def scale(self, layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        assert layer is self.layer
        return output * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _checkpointed(module: Any, x: Tensor, *, reentrant: bool) -> Tensor:
    hidden = module.first(x)
    if reentrant and not hidden.requires_grad:
        return module.inner(hidden)  # type: ignore[no-any-return]
    return checkpoint(module.inner, hidden, use_reentrant=reentrant)  # type: ignore[no-any-return]


def _weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old form is what is tested
        return nn.utils.weight_norm(nn.Linear(3, 3))


MODULES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(3, 2), rows(3)),
    "convolution": Case(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten()), rows(2, 5, 5)),
    "transformer": Case(
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), rows(3, 4)
    ),
    "lstm": Case(Recurrent, rows(5, 3)),
    "gru": Case(lambda: Recurrent(nn.GRU), rows(5, 3)),
    "tied": Case(Tied, rows(3)),
    "lists of parameters": Case(Listed, rows(3)),
    "buffer with gradient": Case(LearningBuffer, rows(3)),
    "hook of its own": Case(Hooked, rows(3)),
    "weight_norm, old": Case(_weight_norm, rows(3)),
    "weight_norm": Case(lambda: parametrizations.weight_norm(nn.Linear(3, 3)), rows(3)),
    "spectral_norm, old": Case(lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), rows(3)),
    "spectral_norm": Case(lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), rows(3)),
    "orthogonal": Case(lambda: parametrizations.orthogonal(nn.Linear(3, 3)), rows(3)),
    "checkpoint": Case(
        lambda: Fn(
            lambda m, x: _checkpointed(m, x, reentrant=False), first=nn.Linear(3, 3), inner=nn.Linear(3, 3)
        ),
        rows(3),
    ),
    "checkpoint, reentrant": Case(
        lambda: Fn(
            lambda m, x: _checkpointed(m, x, reentrant=True), first=nn.Linear(3, 3), inner=nn.Linear(3, 3)
        ),
        rows(3),
    ),
    "complex": Case(lambda: nn.Linear(3, 2, dtype=torch.complex128), rows(3, dtype=torch.complex128)),
    "group norm": Case(lambda: nn.GroupNorm(1, 3), rows(3, 2)),
}


class Failing(nn.Module):
    """Raises what it is told in the lane whose shard holds the given row, in a given order.

    Args:
        errors: row -> what to raise for the shard that holds it.
        order: rows in the order in which they raise.
    """

    def __init__(self, errors: dict[int, BaseException], order: list[int]) -> None:
        super().__init__()
        self.errors = errors
        self.order = order
        self.turns = {row: threading.Event() for row in order}
        self.lanes = Shared()
        self.finished = Notes()

    def forward(self, x: Tensor) -> Tensor:
        row = int(x[0, 0])
        if row not in self.errors:
            self.finished.append(row)
            return x
        place = self.order.index(row)
        if place > 0:
            before = self.order[place - 1]
            assert self.turns[before].wait(20)
            # Raised is not yet recorded: that happens when the lane has put its work down.
            while self.lanes[before].statistics().num_queued > 0:
                self.turns[row].wait(0.001)
        self.lanes[row] = this_thread.lane
        try:
            raise self.errors[row]
        finally:
            self.turns[row].set()


def numbered(num_rows: int) -> Tensor:
    """Rows that carry their own number."""
    return torch.arange(num_rows, dtype=torch.float32).unsqueeze(1)
