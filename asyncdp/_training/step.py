"""One training step: what its lanes compute, and what happens to their gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._distributed.exchange import StepExchange
from .._replicas.copies import wait_issued
from .._replicas.lane_module import ModuleState
from .._replicas.order import Use, in_turn
from .._replicas.replica import Replica
from .._replicas.replica_set import ReplicaSet
from .._replicas.snapshot import ModuleSnapshot
from .._runtime import Lane
from .._torch_private import hooks_of
from .._verbs.batch import Batch, positional
from ..errors import LossNotScalarError
from .commit import (
    AccumulatedGradients,
    SavedGradients,
    StepOptions,
    commit,
    deliver,
    learning_rate_of,
    prepare,
    step_scheduler,
    threads,
)
from .lanes import TrainingLane, TrainingLanes
from .reducer import Gradients, Reducer, add_accumulated

_RECORD = (
    "Check that parameters require gradients and that nothing detaches them. A checkpoint with "
    "use_reentrant=True records nothing around a first layer, since inputs of a step require no gradients: "
    "call it with use_reentrant=False."
)

# Below this an optimizer's step takes less time than changing the thread count twice.
_MIN_ELEMENTS_FOR_THREADS = 2**21


def recording() -> AbstractContextManager[None]:
    """Return a block whose operations can be differentiated, at no cost where they can be anyway."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _NOTHING_TO_CHANGE
    return _recording()


@contextmanager
def _recording() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


_NOTHING_TO_CHANGE = nullcontext()
_is_leaf = attrgetter("is_leaf")
_requires_grad = attrgetter("requires_grad")


class Piece(NamedTuple):
    """What one lane computes of one batch, the inputs and targets of a step.

    Attributes:
        batch: the whole of it.
        leaves: the lane's.
        weight: of its loss in that of the step.
        take: gives the leaves as copies on the lane's device, if that was begun; called once.
    """

    batch: Batch
    leaves: list[Any]
    weight: float
    take: Callable[[], list[Any]] | None = None


class _Prepared(NamedTuple):
    """Parts of a step that all its lanes share."""

    lanes: Sequence[TrainingLane]
    trainable: list[Tensor]
    reducer: Reducer | None
    """None for a single lane, which has nothing to reduce."""
    scale: Tensor | None
    """The factor of a GradScaler."""


class Step:
    """One step, from the first lane's forward to the optimizer.

    Attributes:
        exchange: this process's part in a step that several processes take together.

    Args:
        state: the module to train, as of the call.
        modules: its replica set, which knows what forwards have carried into it since.
        replicas: its training replicas.
        accumulated: gradients that earlier steps have accumulated.
        lanes: where to compute.
        pieces: what each of them computes, one after the other.
        options: what the user said.
        accumulate: accumulate the gradients instead of stepping.
    """

    exchange: StepExchange | None = None

    def __init__(
        self,
        state: ModuleState,
        modules: ReplicaSet,
        replicas: TrainingLanes,
        accumulated: AccumulatedGradients,
        lanes: Sequence[Lane],
        pieces: Sequence[Sequence[Piece]],
        options: StepOptions,
        accumulate: bool,
    ) -> None:
        self.options = options
        self.accumulate = accumulate
        self._state = state
        self._kind = "step", state.training[0]  # what steps have that are likely to write the same parameters
        self._modules = modules
        self._replicas = replicas
        self._accumulated = accumulated
        self._lanes = lanes
        self._pieces = pieces
        self._prepared: _Prepared | None = None
        self._in_place: list[Tensor] | None = None  # what is trainable, if the module itself was trained
        self._saved: SavedGradients | None = None
        self._own: Set[int] = frozenset()
        self._lock = threading.Lock()
        self._own_gradients: Gradients = []
        self._adds_accumulated = not accumulate
        self.is_done = False
        """Whether the step was taken, or its gradients were accumulated."""
        self.learning_rate: float | Tensor | None = None
        """What the optimizer's first group had as it stepped."""

    def run_lane(self, index: int) -> Tensor:
        """Run one lane's forward, loss and backward, and return its share of the loss."""
        with recording():
            return self.compute(index)

    def compute(self, index: int) -> Tensor:
        """Do what `run_lane` does, where operations are recorded already."""
        lanes, _, reducer, scale = self._prepare()
        lane, pieces = lanes[index], self._pieces[index]
        report = None if reducer is None else partial(reducer.report, index)
        shares = []
        try:
            carried = self._state.carried.values_since(self._state.snapshot)
            written = self._modules.written
            module = lane.module(
                self._state.training,
                carried,
                looks_closely=written.needs_close_look(self._kind),
                reads_values=written.reads_values(self._kind),
            )
            for piece in pieces:
                share = self._loss_of(piece, module, self._lanes[index].device)
                positions = lane.end_forward()
                if lane.wrote_uncounted:
                    written.uncounted.add(self._kind)
                self._note_writes(positions)
                is_last = piece is pieces[-1]
                lane.report_to(report if is_last else None)  # the last backward completes them
                self._backward(
                    share if scale is None else share * scale.to(share.device), lane.leaves, is_last
                )
                shares.append(share.detach())
        finally:
            gradients = lane.collect()
        if reducer is None:
            self._own_gradients = gradients
        else:
            if len(pieces) > 1:  # of parameters that the last one did not use
                reducer.report_all(index, gradients)
            reducer.end(index)
        return _sum(shares)

    def compute_in_place(self) -> Tensor | None:
        """Do what `compute(0)` does on a single lane, with the module's own parameters, as in plain torch.

        Without buffers, gradients are all that a failed step has to put back.

        Returns:
            The loss, or None if the lane needs leaves or buffers of its own; nothing has changed then.
        """
        self._state = state = self._state.with_carried_tensors()
        if not _trains_in_place(state.snapshot, self._lanes[0].device):
            return None
        if [*map(_requires_grad, state.snapshot.tensors)] != state.requires:
            return None  # some were frozen, or the other way round, since the call
        trainable = state.trainable()
        self._saved = SavedGradients(trainable, self.options.optimizer)
        carried = state.carried.values_since(state.snapshot)
        replica = self._replicas.bind_in_place(state.snapshot, state.training, carried)
        scale, shares, has_looked = self._scale(trainable), [], False
        try:
            watch = self._modules.written.watch_of(state.snapshot, self._kind)
            before = watch.look()
            for piece in self._pieces[0]:
                share = self._loss_of(piece, replica.module, self._lanes[0].device)
                self._note_writes_in_place(replica, watch.written(before))
                loss = share if scale is None else share * scale.to(share.device)
                self._backward(loss, trainable, piece is self._pieces[0][-1])
                shares.append(share.detach())
            replica.survivors(None, None)  # refuses parts that the forward has made
            has_looked = True
        finally:
            replica.end(is_recorded=False, looks_anew=not has_looked)
        self._in_place = trainable
        return _sum(shares)

    def _note_writes_in_place(self, replica: Replica, written: Sequence[int]) -> None:
        """Carry what goes with parameters that a forward wrote into the module, where those are already."""
        self._note_writes(written)
        if written:
            survivors = replica.survivors(self._state.snapshot, {}, written)
            if survivors is not None:
                self._modules.carried.apply(survivors, self._state.training[0])

    def accumulate_gradients(self) -> None:
        """Accumulate the lanes' gradients for the next step that reduces."""
        assert self._saved is not None, "a lane has begun"
        direct = self._saved.direct()
        if self._in_place is None:
            lanes, trainable, reducer, _ = self._prepare()
            gradients = [self._own_gradients] if reducer is None else reducer.gradients
            self._accumulated.add(trainable, gradients)
            with in_turn(self._change()):
                self._write_back(lanes[0])
        self._accumulated.add(self._saved.tensors, [direct])
        self._saved.restore()
        self.is_done = True

    def commit(self, all_threads: int) -> None:
        """Reduce what is left to reduce, and step with all the machine's threads if that pays."""
        if self._in_place is not None:
            self._commit_in_place(self._in_place)
        elif self.takes_all_threads:
            with threads(all_threads):
                self._commit()
        else:
            self._commit()

    def _commit(self) -> None:
        assert self._saved is not None, "a lane has begun"
        lanes, trainable, reducer, _ = self._prepare()
        sums = self._own_sums(trainable) if reducer is None else reducer.sums()
        deliver(self._saved, trainable, sums, self._accumulated.of(self._saved.outsiders))
        self._take(partial(self._write_back, lanes[0]))

    def _commit_in_place(self, trainable: list[Tensor]) -> None:
        assert self._saved is not None, "the lane has begun"
        if self._accumulated or not self._saved.is_empty:
            self._own_gradients = [None] * len(trainable)  # they are in `.grad` already
            sums = self._own_sums(trainable)
            deliver(self._saved, trainable, sums, self._accumulated.of(self._saved.outsiders))
        self._take(None)

    def _take(self, write_back_buffers: Callable[[], None] | None) -> None:
        """Take the optimizer's step, and then the learning rate scheduler's."""
        assert self._saved is not None, "a lane has begun"
        self.learning_rate = learning_rate_of(self.options.optimizer)
        with in_turn(self._change()):
            if self.options.before_step is not None:
                prepare(self.options)
            has_stepped = commit(self._saved, self.options, write_back_buffers)
            self._accumulated.clear()
            self.is_done = True
            if has_stepped:
                step_scheduler(self.options)

    def _change(self) -> Use:
        """Return what the end of this step does to the module, for its place in the order of tasks."""
        return Use(self._state.snapshot, changes=True, optimizer=self.options.optimizer)

    def _write_back(self, lane: TrainingLane) -> None:
        survivors = lane.take_survivors()
        if survivors is not None:
            self._modules.carried.apply(survivors, self._state.training[0])

    def undo(self) -> None:
        """Restore the gradients after a failure or a cancellation, when all lanes are done."""
        if self._saved is not None and not self.is_done:
            self._saved.restore()

    @property
    def takes_all_threads(self) -> bool:
        """Whether the commit takes long enough to give its lane all the machine's threads."""
        is_spread = len(self._lanes) > 1 and self._lanes[0].device.type == "cpu"
        return is_spread and self._replicas.num_elements >= _MIN_ELEMENTS_FOR_THREADS

    @property
    def needs_first_lane(self) -> bool:
        """Whether the commit has to be the first lane's: no other may write to the module's buffers."""
        return bool(self._state.snapshot.buffer_owners or self._state.snapshot.loose)

    def _loss_of(self, piece: Piece, module: nn.Module, device: torch.device) -> Tensor:
        leaves = piece.leaves if piece.take is None else piece.take()
        (inputs, targets), _ = piece.batch.arguments_on(device, leaves)
        loss = _checked(self.options.loss_fn(module(*positional(inputs)), targets))
        return loss if piece.weight == 1.0 else loss * piece.weight

    def _backward(self, loss: Tensor, leaves: Sequence[Tensor], is_last: bool) -> None:
        """Run a backward, not under autocast, as torch advises: it takes the dtypes of its forward.

        Args:
            loss: of one piece.
            leaves: get the gradients.
            is_last: whether this completes the lane's.
        """
        kind = loss.device.type
        if not torch.is_autocast_enabled(kind):
            loss.backward()
            return
        with torch.autocast(kind, enabled=False):
            loss.backward()

    def _own_sums(self, trainable: Sequence[Tensor]) -> Gradients:
        devices = [tensor.device for tensor in trainable]
        return add_accumulated(self._own_gradients, self._accumulated.of(trainable), devices)

    def _prepare(self) -> _Prepared:
        """Return what the first lane to come here makes for all."""
        if self._prepared is not None:
            return self._prepared
        with self._lock:
            if self._prepared is None:
                self._state = self._state.with_carried_tensors()
                self._prepared = self._prepare_lanes()
            return self._prepared

    def _note_writes(self, positions: Sequence[int]) -> None:
        """Have later steps and passes know which parameters a forward wrote.

        Raises:
            ParameterWrittenError: other lanes may have read or written the same memory.
        """
        written = self._modules.written
        written.add(self._kind, positions)
        if positions and len(self._lanes) > 1:
            written.check_apart(positions, self._own, self._state.snapshot)

    def _prepare_lanes(self) -> _Prepared:
        num_lanes = len(self._lanes)
        snapshot = self._state.snapshot
        self._own = self._modules.written.own(snapshot, self._kind, range(num_lanes))
        lanes = self._replicas.prepare(snapshot, self._state.trainable(), num_lanes, self._own)
        if self._own and num_lanes > 1:
            for lane in lanes:
                lane.refresh()  # before the first lane's forward may write into what they copy
        trainable = self._replicas.trainable
        reducer = None
        if num_lanes > 1:
            overlap = not self.accumulate and all(lane.device.type == "cpu" for lane in self._lanes)
            accumulated = self._accumulated.of(trainable) if self._adds_accumulated else []
            reducer = Reducer(trainable, self._replicas.buckets, num_lanes, accumulated, overlap=overlap)
        if self._saved is None:
            self._saved = SavedGradients(trainable, self.options.optimizer)
        prepared = _Prepared(lanes, trainable, reducer, self._scale(trainable))
        if num_lanes > 1:  # made on this lane's stream, read on those of others
            wait_issued({*(lane.device for lane in self._lanes), *(each.device for each in trainable)})
        return prepared

    def _scale(self, trainable: Sequence[Tensor]) -> Tensor | None:
        if self.options.scaler is None or not trainable:
            return None
        return self.options.scaler.scale(torch.ones((), device=trainable[0].device))  # type: ignore[no-any-return]


def _trains_in_place(snapshot: ModuleSnapshot, device: torch.device) -> bool:
    """Return whether a module can train on `device` itself, without a replica."""
    # A hook is to get the whole gradient, accumulated ones included, and only if all is well.
    if snapshot.buffer_owners or snapshot.loose or not snapshot.is_on(device):
        return False
    parameters = snapshot.parameters
    return not any(chain.from_iterable(map(hooks_of, parameters))) and all(map(_is_leaf, parameters))


def _sum(shares: Sequence[Tensor]) -> Tensor:
    return sum(shares[1:], shares[0])


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossNotScalarError(f"a {type(loss).__qualname__}")
    if loss.numel() != 1:
        raise LossNotScalarError(f"a tensor of shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise LossNotScalarError("a tensor without a gradient function", _RECORD)
    return loss.reshape(()) if loss.dim() else loss
