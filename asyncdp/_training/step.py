"""One training step on its way: what its lanes do, and what becomes of their gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._replicas.replica_set import wait_issued
from .._replicas.snapshot import Outline
from .._runtime import Lane
from .._verbs.batch import positional
from ..errors import LossNotScalarError
from .commit import Accumulated, Held, StepOptions, commit, deliver, threads
from .lanes import Modes, TrainingLane, TrainingLanes, trained_in_place
from .reducer import Gradients, Reducer, add_kept

# Below this an optimizer's step takes less time than changing the thread count twice.
_MIN_ELEMENTS_FOR_THREADS = 2**21

Shard = Callable[[torch.device], tuple[tuple[Any, ...], Mapping[str, Any]]]
"""Gives inputs and targets of one lane, as the only positional arguments, moved to its device."""


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

    lanes: Sequence[TrainingLane]
    learning: list[Tensor]
    reducer: Reducer | None
    """None where one lane is alone: it has nothing to reduce."""
    scale: Tensor | None
    """The factor of a GradScaler."""


class Step:
    """One step, from the first lane's forward to the optimizer.

    Args:
        modes: the module to train, with its modes as of the call.
        replicas: its training replicas.
        kept: gradients that earlier steps held back.
        lanes: where to work, one shard on each.
        shards: inputs and targets.
        weights: each shard's part in the loss.
        options: what the user said.
        accumulate: hold the gradients back instead of stepping.
    """

    def __init__(
        self,
        modes: Modes,
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
        self._modes = modes
        self._module = modes.modules[0]
        self._replicas = replicas
        self._kept = kept
        self._lanes = lanes
        self._shards = shards
        self._weights = weights
        self._prepared: _Prepared | None = None
        self._in_place: list[Tensor] | None = None  # what learns, if the module itself has trained
        self._held: Held | None = None
        self._lock = threading.Lock()
        self._own_gradients: Gradients = []
        self._is_done = False

    def run_lane(self, index: int) -> Tensor:
        """One lane's forward, loss and backward. Returns its share of the loss."""
        with recording():
            return self.compute(index)

    def compute(self, index: int) -> Tensor:
        """As `run_lane`, where operations are recorded already."""
        lanes, _, reducer, scale = self._prepare()
        lane = lanes[index]
        try:
            report = None if reducer is None else partial(reducer.report, index)
            share = self._loss_of(index, lane.module(report, self._modes))
            _backward(share if scale is None else share * scale.to(share.device))
        finally:
            gradients = lane.collect()
        if reducer is None:
            self._own_gradients = gradients
        else:
            reducer.end(index)
        return share.detach()

    def compute_in_place(self) -> Tensor | None:
        """As `compute(0)` of an only lane, with the module itself, as in plain torch.

        Without buffers there is nothing but gradients that a step which fails would have to put back.

        Returns:
            The loss, or None if the module has to have a replica; nothing has changed then.
        """
        self._note_changes()
        device = self._lanes[0].device
        learning = trained_in_place(self._modes.outline, device) if self._modes.hold() else None
        if learning is None:
            return None
        self._held = Held(learning, self.options.optimizer)
        loss = self._loss_of(0, self._module)
        if not self._modes.hold():  # layers may have run in different modes
            return None
        scale = self._scale(learning)
        _backward(loss if scale is None else loss * scale.to(loss.device))
        self._in_place = learning
        return loss.detach()

    def keep(self) -> None:
        """Put the lanes' gradients aside for the next step that reduces."""
        assert self._held is not None
        direct = self._held.direct()
        if self._in_place is None:
            lanes, learning, reducer, _ = self._prepare()
            self._kept.add(learning, [self._own_gradients] if reducer is None else reducer.gradients)
            lanes[0].write_buffers(self._module)
        self._kept.add(self._held.tensors, [direct])
        self._held.restore()
        self._is_done = True

    def commit(self, all_threads: int) -> None:
        """Reduce what is left to reduce, and step with all the machine's threads if that pays."""
        if self._in_place is not None:
            self._commit_in_place(self._in_place)
        elif self.takes_all_threads:
            with threads(all_threads):
                self._commit()
        else:
            self._commit()
        self._is_done = True

    def _commit(self) -> None:
        assert self._held is not None
        lanes, learning, reducer, _ = self._prepare()
        sums = self._own_sums(learning) if reducer is None else reducer.sums()
        deliver(self._held, learning, sums, self._kept.of(self._held.outsiders))
        commit(self._held, self.options, partial(lanes[0].write_buffers, self._module))
        self._kept.clear()

    def _commit_in_place(self, learning: list[Tensor]) -> None:
        assert self._held is not None
        if self._kept or not self._held.is_empty:
            self._own_gradients = [None] * len(learning)  # they are in `.grad` already
            deliver(self._held, learning, self._own_sums(learning), self._kept.of(self._held.outsiders))
        commit(self._held, self.options, None)
        self._kept.clear()

    def undo(self) -> None:
        """After a failure or a cancellation, when all lanes are done: let the gradients be as they were."""
        if self._held is not None and not self._is_done:
            self._held.restore()

    @property
    def takes_all_threads(self) -> bool:
        """Whether the commit pays for giving its lane all the machine's threads; after `run_lane`."""
        is_spread = len(self._lanes) > 1 and self._lanes[0].device.type == "cpu"
        return is_spread and self._replicas.num_elements >= _MIN_ELEMENTS_FOR_THREADS

    @property
    def needs_first_lane(self) -> bool:
        """Whether the commit has to be the first lane's: no other may write to the module's buffers."""
        return self._replicas.has_buffers

    def _loss_of(self, index: int, module: nn.Module) -> Tensor:
        lane = self._lanes[index]
        (inputs, targets), _ = self._shards[index](lane.device)
        loss = self.options.loss_fn(module(*positional(inputs)), targets)
        loss = _checked(loss)
        weight = self._weights[index]
        return loss if weight == 1.0 else loss * weight

    def _own_sums(self, learning: Sequence[Tensor]) -> Gradients:
        return add_kept(self._own_gradients, self._kept.of(learning), [each.device for each in learning])

    def _prepare(self) -> _Prepared:
        """What the first lane to come here makes for all."""
        if self._prepared is not None:
            return self._prepared
        with self._lock:
            if self._prepared is None:
                self._note_changes()
                self._prepared = self._prepare_lanes()
            return self._prepared

    def _note_changes(self) -> None:
        """Let modules that were changed since the call have their modes of now."""
        if not self._modes.outline.is_same():
            self._modes = Modes(Outline(self._module))

    def _prepare_lanes(self) -> _Prepared:
        num_lanes = len(self._lanes)
        lanes = self._replicas.prepare_training(self._module, num_lanes)
        learning = self._replicas.learning
        reducer = None
        if num_lanes > 1:
            overlap = not self.accumulate and all(lane.device.type == "cpu" for lane in self._lanes)
            kept = [] if self.accumulate else self._kept.of(learning)
            reducer = Reducer(learning, self._replicas.buckets, num_lanes, kept, overlap=overlap)
        if self._held is None:
            self._held = Held(learning, self.options.optimizer)
        prepared = _Prepared(lanes, learning, reducer, self._scale(learning))
        if num_lanes > 1:  # made on this lane's stream, read on those of others
            wait_issued({*(lane.device for lane in self._lanes), *(each.device for each in learning)})
        return prepared

    def _scale(self, learning: Sequence[Tensor]) -> Tensor | None:
        if self.options.scaler is None or not learning:
            return None
        return self.options.scaler.scale(torch.ones((), device=learning[0].device))  # type: ignore[no-any-return]


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
