"""One training step on its way: what its lanes do, and what becomes of their gradients."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._reducer import Gradients, Reducer, add_kept
from ._runtime import Lane
from ._scatter import move
from ._training_commit import Accumulated, Commit, StepOptions, threads
from ._training_lanes import InPlaceLane, TrainingLane, TrainingLanes
from .errors import LossNotScalarError

# Below this an optimizer's step takes less time than changing the thread count twice.
_MIN_ELEMENTS_FOR_THREADS = 2**21

Shard = tuple[tuple[Any, ...], Any]
"""One lane's positional arguments and targets."""


def recording() -> AbstractContextManager[None]:
    """A block whose operations can be differentiated, at no cost where they can be anyway."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _NOTHING_TO_CHANGE
    return _recording()


@contextmanager
def _recording() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


_NOTHING_TO_CHANGE = nullcontext()


class _Prepared(NamedTuple):
    """What all lanes of a step share."""

    lanes: Sequence[TrainingLane | InPlaceLane]
    learning: list[Tensor]
    reducer: Reducer | None
    """None where one lane is alone: it has nothing to reduce."""
    scale: Tensor | None
    """The factor of a GradScaler."""


class Step:
    """One step, from the first lane's forward to the optimizer.

    Args:
        module: what to train.
        replicas: its training replicas.
        kept: gradients that earlier steps held back.
        lanes: where to work, one shard on each.
        shards: arguments and targets.
        weights: each shard's part in the loss.
        options: what the user said.
        accumulate: hold the gradients back instead of stepping.
    """

    def __init__(
        self,
        module: nn.Module,
        replicas: TrainingLanes,
        kept: Accumulated,
        lanes: Sequence[Lane],
        shards: Sequence[Shard],
        weights: Sequence[float],
        options: StepOptions,
        accumulate: bool,
    ) -> None:
        self.options = options
        self.accumulate = accumulate
        self._module = module
        self._replicas = replicas
        self._kept = kept
        self._lanes = lanes
        self._shards = shards
        self._weights = weights
        self._prepared: _Prepared | None = None
        self._lock = threading.Lock()
        self._own_gradients: Gradients = []

    def run_lane(self, index: int) -> Tensor:
        """One lane's forward, loss and backward. Returns its share of the loss."""
        with recording():
            lanes, _, reducer, scale = self._prepare()
            try:
                module = lanes[index].module(None if reducer is None else partial(reducer.report, index))
                share = self._loss_of(index, module)
                _backward(share if scale is None else share * scale.to(share.device))
            finally:
                gradients = lanes[index].collect()
            if reducer is None:
                self._own_gradients = gradients
            else:
                reducer.end(index)
            return share.detach()

    def keep(self) -> None:
        """Put the lanes' gradients aside for the next step that reduces."""
        lanes, learning, reducer, _ = self._prepare()
        self._kept.add(learning, [self._own_gradients] if reducer is None else reducer.gradients)
        lanes[0].write_buffers(self._module)

    def commit(self, all_threads: int) -> None:
        """Reduce what is left to reduce, and step with all the machine's threads if that pays."""
        lanes, learning, reducer, _ = self._prepare()
        lane = lanes[0]
        plain = isinstance(lane, InPlaceLane) and not lane.has_gradients
        commit = Commit(learning, self.options, plain=plain)
        with threads(all_threads) if self.takes_all_threads else nullcontext():
            sums = self._own_sums(learning) if reducer is None else reducer.sums()
            commit.run(sums, partial(lanes[0].write_buffers, self._module))
        self._kept.clear()

    @property
    def takes_all_threads(self) -> bool:
        """Whether the commit pays for giving its lane all the machine's threads; after `run_lane`."""
        is_spread = len(self._lanes) > 1 and self._lanes[0].device.type == "cpu"
        return is_spread and self._replicas.num_elements >= _MIN_ELEMENTS_FOR_THREADS

    def _loss_of(self, index: int, module: nn.Module) -> Tensor:
        device = self._lanes[index].device
        args, targets = self._shards[index]
        outputs = module(*[move(each, device) for each in args])
        loss = _checked(self.options.loss_fn(outputs, move(targets, device)))
        weight = self._weights[index]
        return loss if weight == 1.0 else loss * weight

    def _own_sums(self, learning: Sequence[Tensor]) -> Gradients:
        kept = self._kept.of(learning)
        if not kept and isinstance(self._prepare().lanes[0], InPlaceLane):
            return self._own_gradients
        return add_kept(self._own_gradients, kept, [each.device for each in learning])

    def _prepare(self) -> _Prepared:
        """What the first lane to come here makes for all."""
        if self._prepared is not None:
            return self._prepared
        with self._lock:
            if self._prepared is None:
                self._prepared = self._prepare_alone() or self._prepare_lanes()
            return self._prepared

    def _prepare_alone(self) -> _Prepared | None:
        """The module as it is for one lane, where that can do without a replica."""
        if len(self._lanes) > 1:
            return None
        lane = InPlaceLane.of(self._module, self._lanes[0].device)
        return None if lane is None else _Prepared([lane], lane.learning, None, self._scale(lane.learning))

    def _prepare_lanes(self) -> _Prepared:
        num_lanes = len(self._lanes)
        lanes = self._replicas.prepare_training(self._module, num_lanes)
        learning = self._replicas.learning
        reducer = None
        if num_lanes > 1:
            overlap = not self.accumulate and all(lane.device.type == "cpu" for lane in self._lanes)
            kept = [] if self.accumulate else self._kept.of(learning)
            reducer = Reducer(learning, self._replicas.buckets, num_lanes, kept, overlap=overlap)
        return _Prepared(lanes, learning, reducer, self._scale(learning))

    def _scale(self, learning: Sequence[Tensor]) -> Tensor | None:
        if self.options.scaler is None or not learning:
            return None
        scale: Tensor = self.options.scaler.scale(torch.ones((), device=learning[0].device))
        return scale


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossNotScalarError(f"a {type(loss).__qualname__}")
    if loss.numel() != 1:
        raise LossNotScalarError(f"a tensor of shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise LossNotScalarError("a tensor without a gradient function")
    return loss.reshape(()) if loss.dim() else loss


def _backward(loss: Tensor) -> None:
    """As torch advises, not under autocast: a backward takes the dtypes of its forward."""
    kind = loss.device.type
    if not torch.is_autocast_enabled(kind):
        loss.backward()
        return
    with torch.autocast(kind, enabled=False):
        loss.backward()
