"""One training step that several processes take together, or none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._distributed.communicator import Communicator
from .._distributed.exchange import Contribution, StepExchange
from .._distributed.layout import Layout
from .._replicas.order import in_turn
from .._runtime.task import on_cancel
from ..errors import UnsupportedModuleError
from .commit import clear, commit, deliver, forget_unscaling, learning_rate_of, prepare, step_scheduler
from .processes import StepGivenUpError, digest_of_gradients, settings_of
from .reducer import Gradients, add_up
from .shared_state import decoded, encoded
from .step import Step

T = TypeVar("T")


class SharedStep(Step):
    """One step of this process among several.

    Args:
        exchange: this process's part, as the others see it.
        communicator: talks to them.
        *args: of a `Step`.
    """

    def __init__(self, exchange: StepExchange, communicator: Communicator, *args: Any) -> None:
        super().__init__(*args)
        self.exchange = exchange
        self._communicator = communicator
        self._totals: Gradients = []
        self._adds_accumulated = False

    def run(self, function: Callable[[], T]) -> T | None:
        """Run a task of this step on its lane; if it fails or is cancelled, the step fails everywhere.

        Returns:
            What the function did; None if the step is not taken and another task says why, or none needs to.
        """
        assert self.exchange is not None
        on_cancel(partial(self.exchange.fail, "its caller was cancelled"))
        try:
            if not self.exchange.has_begun:
                self.exchange.begin(settings_of(self.options))
            return function()
        except StepGivenUpError:
            return None
        except BaseException as error:
            self.exchange.fail(error)
            raise

    def compute(self, index: int) -> Tensor:
        """Run one lane's forward, loss and backward, unless only other processes have rows."""
        if not self._has_nothing():
            return super().compute(index)
        trainable = self._prepare().trainable
        self._own_gradients = [None] * len(trainable)
        return torch.zeros(())

    def compute_in_place(self) -> Tensor | None:
        """Do the same with the module's own parameters, where that is possible."""
        return None if self._has_nothing() else super().compute_in_place()

    def settle(self, loss: Tensor) -> Tensor:
        """Sum loss and gradients over all processes, after every lane has succeeded; return the loss."""
        assert self.exchange is not None
        assert self._saved is not None, "a lane has begun"
        saved, lane, is_owner = self._saved, None, False
        if self._in_place is None:
            lane = self._prepare().lanes[0]
            self._weight()  # the processes have agreed on an owner then
            is_owner = self.exchange.is_owner(self._communicator.rank)
        totals = self.exchange.reduce(
            Contribution(
                *self._local_gradients(),
                loss=None if self._has_nothing() else loss,
                earlier=0 if saved.is_empty else digest_of_gradients(saved.gradients),
                state=encoded(lane.survivors) if lane is not None and is_owner else b"",
            )
        )
        if totals is None:
            raise StepGivenUpError
        self._totals = totals.gradients
        if lane is not None and not is_owner:
            lane.survivors = decoded(totals.state, self._state.snapshot, self._lanes[0].device)
        return torch.tensor(totals.loss, dtype=totals.loss_dtype, device=loss.device)

    def accumulate_gradients(self) -> None:
        """Accumulate this process's gradients, if all processes accumulate theirs."""
        self._agree_to_take()
        with self._diverging():
            self._weigh()
            super().accumulate_gradients()

    def _weigh(self) -> None:
        """Give gradients that no bucket takes the weight of this process."""
        assert self._saved is not None, "a lane has begun"
        reducer = None if self._in_place is not None else self._prepare().reducer
        own = [self._own_gradients] if reducer is None else reducer.gradients
        weight = self._weight()
        with torch.no_grad():
            for gradient in chain(self._saved.direct(), *own):
                if gradient is not None:
                    gradient.mul_(weight)

    def _has_nothing(self) -> bool:
        assert self.exchange is not None
        return self.exchange.intent.rows == 0 and self._weight() == 0.0

    def _weight(self) -> float:
        assert self.exchange is not None
        weight = self.exchange.weight()
        if weight is None:
            raise StepGivenUpError
        return weight

    def _backward(self, loss: Tensor, leaves: Sequence[Tensor], is_last: bool) -> None:
        """Give buckets while the backward runs, where one lane has all of them."""
        hooks = []
        if is_last and len(self._lanes) == 1 and not self.accumulate and not self._accumulated:
            hooks = [
                leaves[place].register_post_accumulate_grad_hook(partial(self._offer, bucket, leaves))
                for bucket, place in self._layout().triggers()
            ]
        try:
            super()._backward(loss, leaves, is_last)
        finally:
            for hook in hooks:
                hook.remove()

    def _offer(self, number: int, leaves: Sequence[Tensor], _: Tensor) -> None:
        """Give a bucket, if all its gradients are there."""
        assert self.exchange is not None
        gradients: dict[int, Tensor | None] = {
            place: leaves[place].grad for place in self._layout().buckets[number].places
        }
        if None not in {id(each) if each is not None else None for each in gradients.values()}:
            self.exchange.offer(number, gradients)

    def _layout(self) -> Layout:
        assert self.exchange is not None
        assert self.exchange.intent.workload is not None
        return self.exchange.intent.workload.layout

    def _note_writes(self, positions: Sequence[int]) -> None:
        super()._note_writes(positions)
        if positions:
            self._communicator.diverge()
            raise UnsupportedModuleError(
                self._state.snapshot.modules[0],
                "its forward writes into its own parameters, of which every process has its own",
                "Write them in before_step, the same on every process, and call engine.rejoin(group) now.",
            )

    def _local_gradients(self) -> tuple[Gradients, Sequence[Gradients]]:
        """Return what this process has of every tensor of the layout, and what earlier steps accumulated."""
        assert self._saved is not None, "a lane has begun"
        saved, trainable = self._saved, self._in_place
        if self.accumulate:
            return [None] * self._layout().num_tensors, ()
        own: Gradients = [None] * len(trainable or ())
        if trainable is None:
            trainable, reducer = self._prepare()[1:3]
            own = self._own_gradients if reducer is None else reducer.sums()
        own = [*own, *[None] * len(saved.outsiders)]
        tensors = [*trainable, *saved.outsiders]
        direct = {id(tensor): tensor.grad for tensor in saved.tensors if tensor.grad is not None}
        if direct:
            groups = [([each, direct.get(id(tensor))], ()) for each, tensor in zip(own, tensors, strict=True)]
            own = add_up(groups, [tensor.device for tensor in tensors])
        accumulated = self._accumulated.of(tensors) if self._accumulated else ()
        return own, accumulated

    def _commit(self) -> None:
        lanes, trainable, _, _ = self._prepare()
        self._deliver(trainable)
        self._take(partial(self._write_back, lanes[0]))

    def _commit_in_place(self, trainable: list[Tensor]) -> None:
        self._deliver(trainable)
        self._take(None)

    def _deliver(self, trainable: list[Tensor]) -> None:
        """Put the gradients of all processes into `.grad`."""
        assert self._saved is not None, "a lane has begun"
        saved, count = self._saved, len(trainable)
        clear(saved.tensors)
        for tensor, total in zip(saved.outsiders, self._totals[count:], strict=True):
            tensor.grad = total
        if self._in_place is None or not saved.is_empty:
            deliver(saved, trainable, self._totals[:count], ())
            return
        for tensor, total in zip(trainable, self._totals[:count], strict=True):
            tensor.grad = total

    def _take(self, write_back_buffers: Callable[[], None] | None) -> None:
        assert self._saved is not None, "a lane has begun"
        self.learning_rate = learning_rate_of(self.options.optimizer)
        with in_turn(self._change()):
            prepare(self.options)
        try:
            self._agree_to_take()  # holds up no forward of the module meanwhile
        except BaseException:
            forget_unscaling(self.options)
            raise
        with self._diverging(), in_turn(self._change()):
            has_stepped = commit(self._saved, self.options, write_back_buffers)
            self._accumulated.clear()
            self.is_done = True
            if has_stepped:
                step_scheduler(self.options)

    def _agree_to_take(self) -> None:
        assert self.exchange is not None
        if not self.exchange.vote():
            raise StepGivenUpError

    def _diverging(self) -> _Diverging:
        return _Diverging(self._communicator)


class _Diverging:
    """A block that has other processes go on without this one's steps if it raises."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            self._communicator.diverge()
            error.add_note(
                "the other processes have taken this step: call `await engine.rejoin(group)` on all of them"
            )
