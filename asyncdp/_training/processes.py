"""Steps that several processes take together: what must be alike, and how each step begins and ends."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _loops
from .._distributed.adoption import Standing, adopt, compare, describe
from .._distributed.agreement import Kind
from .._distributed.communicator import Communicator
from .._distributed.digest import digest_of
from .._distributed.exchange import Intent, StepExchange, Workload
from .._distributed.layout import Layout
from .._distributed.transport import Transport
from .._replicas.lane_module import ModuleState
from .._replicas.order import Use, in_turn
from .._torch_private import hooks_of
from .._verbs.batch import Batch
from .commit import StepOptions
from .reducer import Gradients

T = TypeVar("T")

_parameters = itemgetter("params")


class StepGivenUpError(Exception):
    """This lane need not go on: the step was cancelled, failed on another lane, or is none."""


class SharedSteps:
    """Makes this process's part in steps that several processes take together.

    Args:
        communicator: talks to the others.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self._key: list[Any] = []
        self._workload: Workload | None = None
        self._held: list[Any] = []  # so that ids in the key stay theirs

    def exchange(
        self, batches: Sequence[Batch], options: StepOptions, state: ModuleState, *, accumulate: bool
    ) -> StepExchange:
        """Return this process's part in a step; one without batches takes part without rows."""
        kind = Kind.STEP if batches else Kind.ENDED
        if batches and (accumulate or options.reduce_only):
            kind = Kind.ACCUMULATE if accumulate else Kind.REDUCE_ONLY
        counts = [batch.rows_if_any for batch in batches]
        rows = None if None in counts else sum(count or 0 for count in counts)
        can_fail = options.before_step is not None or options.scaler is not None
        trainable = state.trainable()
        needs_vote = (
            can_fail
            or bool(state.snapshot.buffer_owners or state.snapshot.loose)
            or any(chain.from_iterable(map(hooks_of, filter(lambda each: each.is_leaf, trainable))))
        )
        workload = self._describe(trainable, options, state)
        is_sum = options.loss_reduction == "sum"
        return self.communicator.exchange(Intent(kind, rows, workload, is_sum, needs_vote))

    async def aclose(self, timeout: float) -> None:
        """End what this process has begun, for `timeout` seconds at most, and close the connections."""
        await on_thread(partial(self.communicator.close, timeout))

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the others that this process takes no step where they may, and because of which error."""
        exchange = self.communicator.exchange(Intent(Kind.LEFT))
        if error is not None:
            exchange.fail(error)
        exchange.begin()

    def _describe(self, trainable: Sequence[Tensor], options: StepOptions, state: ModuleState) -> Workload:
        groups = () if options.reduce_only else getattr(options.optimizer, "param_groups", ())
        kind = None if options.reduce_only else type(options.optimizer)
        tensors = [*chain.from_iterable(map(_parameters, groups))]
        sizes = [len(each["params"]) for each in groups]
        key: list[Any] = [state.snapshot, state.requires, [*map(id, tensors)], kind, sizes]
        key += [options.loss_reduction, options.scaler is None]
        if self._workload is None or key != self._key:
            self._key, self._held = key, tensors
            known = {*map(id, trainable)}
            outsiders = [tensor for tensor in tensors if id(tensor) not in known]
            self._workload = _workload([*trainable, *outsiders], len(trainable), state, options, kind, sizes)
        return self._workload


@contextmanager
def refusing(shared: SharedSteps) -> Iterator[None]:
    """Have the step that comes next fail on all processes if the block raises."""
    try:
        yield
    except BaseException as error:
        shared.leave(error)
        raise


def meet(process_group: Any, module: nn.Module) -> SharedSteps:
    """Have several processes train one module; block until all have come here.

    Raises:
        ProcessMismatchError: the modules are not alike; on all processes.
    """
    transport = Transport(process_group)
    owner, _ = compare(transport, module)
    adopt(transport, module, (), owner)
    return SharedSteps(Communicator(transport))


async def meet_again(
    process_group: Any, module: nn.Module, others: Sequence[Any], change: Use, before: SharedSteps | None
) -> tuple[SharedSteps, int]:
    """Have several processes train one module, from the state of the one that has taken the most steps.

    Args:
        process_group: they are in.
        module: what they train.
        others: the optimizer, the learning rate scheduler and the scaler; None for none.
        change: of the module and the optimizer, for its turn among all that reads them.
        before: with the processes until now.

    Returns:
        What goes on with them, and how many steps were taken.

    Raises:
        ProcessMismatchError: the modules are not alike; on all processes.
    """
    num_done, is_diverged = (0, False) if before is None else before.communicator.progress
    standing = Standing(True, num_done, is_diverged)
    if before is not None:
        await before.aclose(0.0)

    def run() -> tuple[SharedSteps, int]:
        transport = Transport(process_group)
        owner, most = compare(transport, module, others, standing)
        with in_turn(change):
            adopt(transport, module, others, owner)
        return SharedSteps(Communicator(transport, most)), most

    return await on_thread(run)


async def on_thread(function: Callable[[], T]) -> T:
    """Run a function that waits for other processes on a thread of its own, to its end."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        ended.finish()

    ended = _loops.current().completion(lambda: None)
    threading.Thread(target=run, name="asyncdp-processes", daemon=True).start()
    await ended
    if errors:
        raise errors.pop()
    return results.pop()


def settings_of(options: StepOptions) -> str:
    """Describe what steps may change and the next one uses: the scale of losses, and each group's options.

    Waits for the device of what is a tensor: for lanes, once all earlier steps have ended.
    """
    if options.reduce_only:
        return ""
    groups = getattr(options.optimizer, "param_groups", ())
    lines = [f"group {place}: {_numbers_of(group)}" for place, group in enumerate(groups)]
    if options.scaler is not None:
        lines.append(f"a scaler of scale {options.scaler.get_scale()!r}")
    return "\n".join(lines)


def _numbers_of(group: dict[str, Any]) -> str:
    values = {
        name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        for name, value in group.items()
    }
    return ", ".join(
        f"{name}={value!r}" for name, value in values.items() if isinstance(value, (int, float, tuple))
    )


def _workload(
    tensors: Sequence[Tensor],
    num_trainable: int,
    state: ModuleState,
    options: StepOptions,
    kind: type | None,
    sizes: list[int],
) -> Workload:
    module = state.snapshot.modules[0]
    names = {id(tensor): name for name, tensor in chain(module.named_parameters(), module.named_buffers())}
    layout = Layout(tensors, num_trainable)
    lines = [
        f'loss_reduction="{options.loss_reduction}"',
        "no scaler" if options.scaler is None else "a scaler",
        "no optimizer" if kind is None else f"{kind.__qualname__} over groups of {sizes} tensors",
        *(
            describe(names.get(id(each), f"outside of the module: {place}"), each)
            for place, each in enumerate(tensors)
        ),
        layout.describe(),
    ]
    text = "\n".join(lines)
    return Workload(layout, text, digest_of(text))


def digest_of_gradients(gradients: Gradients) -> int:
    """Return a digest of the values of gradients; 0 if there are none."""
    digest = hashlib.blake2b(digest_size=8)
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            digest.update(place.to_bytes(8, "big"))
            values = gradient.to_dense().detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big") >> 2 if any(each is not None for each in gradients) else 0
