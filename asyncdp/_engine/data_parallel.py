"""`data_parallel` and the persistent engine `DataParallel`."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._checks import as_optional_seconds, check_counts, check_dim, check_flags, shown
from .._devices import DeviceLike, Devices, parse_devices
from .._distributed.transport import group_of
from .._replicas.copies import DEFAULT_BUCKET_BYTES
from .._replicas.order import Use
from .._replicas.replica_set import ReplicaSet, replica_set_of
from .._replicas.snapshot import check_module
from .._runtime import Lane, Runtime, RuntimeStatistics, check_runtime, default_lanes, scheduler_of
from .._runtime.hangs import GRACE_SECONDS, grace_of
from .._training.checkpoint.keeper import CheckpointKeeper
from .._training.commit import StepOptions
from .._training.processes import meet, meet_again, refusing
from .._training.trainer import Trainer
from .._verbs.batch import Batch, positional
from ..errors import NotAModuleError
from .calls import EngineView
from .route import Route
from .source import Source, check_iterable
from .stateful import StatefulCalls
from .train import Steps, StepStream
from .tuner import LaneChoice


async def data_parallel(
    module: nn.Module,
    inputs: Any,
    devices: Devices = None,
    output_device: DeviceLike | None = None,
    dim: int = 0,
    *,
    module_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Run a module on a batch split over several devices.

    The module's replicas are cached for as long as the module lives, so that calling this in a loop
    copies nothing again.

    Args:
        module: what to run. Its forward may get fewer rows per call than the batch has.
        inputs: a tuple holds positional arguments, anything else is the only one; nested at will. Lists
            with one entry per row are a `PerRow`, what belongs to the whole batch is a `Whole`.
        devices: one lane per entry; see `parse_devices`.
        output_device: where the result goes; the first of `devices` if None.
        dim: dimension of inputs and outputs that is split and concatenated.
        module_kwargs: keyword arguments, split like the inputs.

    Returns:
        What `module` would return for the whole batch, on `output_device`, differentiable with
        respect to inputs and parameters.

    Raises:
        NotAModuleError, LazyModuleError, UnsupportedModuleError: the module cannot be replicated.
        UnknownDeviceError, NoCudaDeviceError, NoDevicesError: a device cannot be used.
        LengthMismatchError: inputs differ in length along `dim`.
        UnsplittableError, AmbiguousSequenceError: nobody knows how to split an input.
        GatherError: outputs of the shards do not fit together.
        BaseException: the first exception in time that a replica raised, after all have ended.
    """
    if not isinstance(module, nn.Module):
        raise NotAModuleError(module)
    if module_kwargs is not None and not isinstance(module_kwargs, Mapping):
        raise TypeError(f"module_kwargs must be a dict or None, but got {shown(module_kwargs)}.")
    check_dim(dim)
    targets = parse_devices(devices)
    output = targets[0] if output_device is None else parse_devices(output_device)[0]
    replicas = replica_set_of(module, targets)
    scheduler, lanes = default_lanes(targets)
    route = Route(module, replicas, scheduler, lanes, output, dim)
    batch = Batch(positional(inputs), module_kwargs or {}, dim)
    if len(lanes) == 1:
        return await route.run_whole(batch)
    return await route.run_split(batch, len(lanes))


@dataclass(frozen=True)
class DataParallelStatistics:
    """Statistics of an engine at one moment."""

    num_passes: int
    """Passes that succeeded."""
    num_steps: int
    """Optimizer steps taken, including those whose caller was cancelled while the optimizer ran, and those
    before a checkpoint that was loaded."""
    num_lanes: int
    choices: tuple[LaneChoice, ...]
    """With num_lanes="auto": how many lanes each kind of call takes, and why."""
    runtime: RuntimeStatistics


# Engines whose steps only accumulate, in this task's context alone: other tasks may step meanwhile.
_accumulating: ContextVar[tuple[object, ...]] = ContextVar("asyncdp_accumulating", default=())


class DataParallel(StatefulCalls):
    """A module with persistent replicas on several lanes.

    An async context manager. Replicas that share the module's device share its parameters, so that
    nothing is copied; changes of the module are noticed at the next call.

    Args:
        module: what to run.
        devices: one lane per entry; see `parse_devices`. With `runtime` given, which of its lanes.
        output_device: where results go; the first lane's device if None.
        dim: dimension of inputs and outputs that is split and concatenated.
        num_lanes: how many lanes a call is split over: "all", a number, or "auto", which learns from
            the calls how many are quickest; see `statistics`. The meaning of a result never depends on
            it: where it could (batch statistics in train mode, outputs that are not rows of the batch,
            torch's deterministic mode), "auto" stays on all lanes.
        runtime: run on these lanes instead of on own ones. It is not closed with the engine.
        bucket_bytes: gradients that one reduce-add covers in a backward of the caller's own.
        checksum: read all weights at every pass that has copies of them on another device, so as to
            notice changes made behind autograd's back without a `refresh`.
        process_group: of torch.distributed, or one dimension of a `DeviceMesh`: training steps are taken by
            all of its processes together, or by none. Making the engine blocks until all of them do, compares
            their modules, and gives the parameters and buffers of process 0 to all.

    Raises:
        NotAModuleError, LazyModuleError, UnsupportedModuleError: the module cannot be replicated.
        UnknownDeviceError, NoCudaDeviceError, NoDevicesError: a device cannot be used.
        ValueError, TypeError: another argument is none of the above.
        ProcessGroupError: `process_group` is none, or this process is not in it.
        ProcessMismatchError: the modules of the processes are not alike; on all of them.
    """

    def __init__(
        self,
        module: nn.Module,
        devices: Devices = None,
        output_device: DeviceLike | None = None,
        dim: int = 0,
        *,
        num_lanes: int | str = "auto",
        runtime: Runtime | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        checksum: bool = False,
        process_group: Any = None,
    ) -> None:
        check_module(module)
        check_runtime(runtime)
        check_counts(bucket_bytes=bucket_bytes)
        check_flags(checksum=checksum)
        check_dim(dim)
        group = None if process_group is None else group_of(process_group)
        output = None if output_device is None else parse_devices(output_device)[0]
        self._owns_runtime = runtime is None
        self.runtime = Runtime(devices) if runtime is None else runtime
        lanes = self._choose_lanes(devices)
        output = lanes[0].device if output is None else output
        scheduler = scheduler_of(self.runtime)
        most = _check_num_lanes(num_lanes, len(lanes))
        replicas = ReplicaSet(module, [lane.device for lane in lanes], bucket_bytes, checksum)
        route = Route(module, replicas, scheduler, lanes, output, dim)
        super().__init__(self.runtime, route, most, num_lanes == "auto" and len(lanes) > 1)
        self._trainer = Trainer(module, replicas, scheduler, lanes, output)
        self._checkpoints = CheckpointKeeper(replicas, self._trainer, scheduler, lanes)
        if group is not None:
            self._trainer.shared = meet(group, module)

    def _choose_lanes(self, devices: Devices) -> tuple[Lane, ...]:
        if self._owns_runtime or devices is None:
            return self.runtime.lanes
        return tuple(scheduler_of(self.runtime).lanes_for(parse_devices(devices)))

    def __repr__(self) -> str:
        names = ", ".join(lane.name for lane in self._route.lanes)
        return (
            f"<DataParallel {type(self.module).__name__} on [{names}]: {self._route.num_passes} passes done>"
        )

    async def __aenter__(self) -> DataParallel:
        return self

    async def __aexit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        await self.aclose(grace_of(exc))

    async def aclose(self, timeout: float | None = None) -> None:
        """Drain what runs and end the lanes, if they are the engine's own; `timeout` as `Runtime.aclose`."""
        timeout = as_optional_seconds("timeout", timeout)
        if self._owns_runtime:
            await self.runtime.aclose(timeout)
        if self._trainer.shared is not None:
            await self._trainer.shared.aclose(
                GRACE_SECONDS if timeout is None else min(timeout, GRACE_SECONDS)
            )

    def in_mode(self, training: bool) -> EngineView:
        """Return a view of this engine whose calls run in train mode, or in eval mode.

        Whatever the flags of the module say, and without touching them: a service can answer in eval mode
        beside a task that trains. `train()` itself is not called, and a module whose `train()` does more than
        set flags is not told.

        Args:
            training: the mode of the module and all below it.
        """
        if not isinstance(training, bool):
            raise TypeError(
                f"training must be True or False, but got {shown(training)}. "
                "For eval mode use in_mode(False)."
            )
        if training not in self._views:
            route = self._route.in_mode(training)
            self._views[training] = EngineView(
                self.runtime, route, self._num_lanes, self._adaptive is not None, training
            )
        return self._views[training]

    async def train_step(
        self,
        inputs: Any,
        targets: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: Any,
        *,
        loss_reduction: str = "mean",
        before_step: Callable[[], object] | None = None,
        scaler: Any = None,
        reduce_only: bool = False,
    ) -> Tensor:
        """Train on one batch: forward, loss and backward on every lane, then one optimizer step.

        The step is the one that a single device would take with the whole batch. Gradients that parameters
        already hold are added to, as a plain backward would; after the optimizer's step all are None.

        A step that fails or is cancelled changes no parameter, gradient, buffer or optimizer state. Once
        the optimizer has begun it runs to its end, and a cancellation goes on after a whole step. Only an
        error that the optimizer itself raises can leave a step half done, and says so. Steps of one
        module run one after the other, whichever engine and event loop they come from.

        Args:
            inputs: as `asyncdp.data_parallel` takes them. No gradient flows back to them.
            targets: what `loss_fn` compares with; split like the inputs. May be None.
            loss_fn: called on every lane with its outputs and its targets; returns one number.
            optimizer: of torch.optim, over the module's parameters. None only with `reduce_only`.
                On the CPU `fused=True` makes its step cheapest.
            loss_reduction: whether `loss_fn` gives the "mean" over the rows it gets, or the "sum".
            before_step: called on a lane between reduce and step, with the whole gradients in `.grad`,
                unscaled: `lambda: clip_grad_norm_(module.parameters(), 1.0)`, say.
            scaler: a `torch.amp.GradScaler`; scales the loss, steps and updates itself.
            reduce_only: leave the gradients in `.grad` for the caller, and take no step.

        Returns:
            The loss of the whole batch, 0-d, detached, on the engine's output device.

        Raises:
            LossReductionError, NotAnOptimizerError, ClosureOptimizerError: before anything runs.
            LossNotScalarError: `loss_fn` returned no single number that depends on the parameters.
            LengthMismatchError: inputs and targets differ in length.
            PeerStepError: another process has failed or is gone, or processes are out of step.
            BaseException: the first exception in time on any lane, after all have ended.
        """
        options = StepOptions(loss_fn, optimizer, loss_reduction, before_step, scaler, reduce_only)
        with nullcontext() if self._trainer.shared is None else refusing(self._trainer.shared):
            options.check()
            state = self._trainer.capture()
            batch = Batch.of_step(inputs, targets, self._route.dim, self._num_lanes)
        num_lanes, record = self._num_lanes, None
        if self._adaptive is not None:
            num_lanes, record = self._adaptive.choose_for_step([batch], state.snapshot)
        return await self._trainer.step(
            batch, options, num_lanes, state, accumulate=self in _accumulating.get(), record=record
        )

    def train(
        self,
        batches: Iterable[tuple[Any, Any]] | AsyncIterable[tuple[Any, Any]],
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: Any,
        *,
        scheduler: Any = None,
        before_step: Callable[[], object] | None = None,
        scaler: Any = None,
        accumulate: int = 1,
        max_ahead: int = 2,
        loss_reduction: str = "mean",
    ) -> StepStream:
        """Train on a stream of batches: step after step on the lanes, none of which waits for the event loop.

        Each step is that of `train_step`: all or nothing, in turn with whatever else uses the module. The
        next ones wait on the lanes while one runs, their batches copied ahead. A step that fails ends the
        stream, after the results of those before it. Modes of the module (`train()`, `eval()`), grad mode and
        autocast are those of this call; other changes of the module hold for steps that are begun later.

        Args:
            batches: pairs of inputs and targets, as `train_step` takes them. Sequences are read on the loop,
                other iterables on a thread, async iterables by awaiting.
            loss_fn: as for `train_step`.
            optimizer: as for `train_step`.
            scheduler: of torch.optim.lr_scheduler; stepped on the lane after each step that the optimizer
                has taken, so not after one that `scaler` has it skip.
            before_step: as for `train_step`.
            scaler: as for `train_step`.
            accumulate: batches that make up a step, as if they were one with all their rows. They run one
                after the other; the last step may have fewer.
            max_ahead: steps begun or queued whose results were not taken.
            loss_reduction: as for `train_step`.

        Returns:
            An async iterator of `StepResult`, also an async context manager. Leaving it early begins no
            further step and gives up one that runs, unless its optimizer has begun.

        Raises:
            TypeError, ValueError: an argument is none of the above.
        """
        options = StepOptions(loss_fn, optimizer, loss_reduction, before_step, scaler, scheduler=scheduler)
        with nullcontext() if self._trainer.shared is None else refusing(self._trainer.shared):
            options.check()
            check_iterable(batches)
            check_counts(accumulate=accumulate, max_ahead=max_ahead)
            if self in _accumulating.get():
                raise ValueError(
                    "train() steps by itself and cannot accumulate under no_sync(). "
                    "Call it outside of the block, with accumulate=."
                )
            steps = Steps(
                self._trainer, options, self._adaptive, self._num_lanes, self._route.dim, self.lanes
            )
        return StepStream(steps, Source(batches), accumulate, max_ahead)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let this task's `train_step` calls within the block only accumulate, not reduce or step.

        The gradients stay on their lanes, not in `.grad`, until the next step outside of the block
        adds them to its own; `discard_accumulated` drops them instead.
        """
        token = _accumulating.set((*_accumulating.get(), self))
        try:
            yield
        finally:
            _accumulating.reset(token)

    async def rejoin(
        self, process_group: Any, optimizer: Any = None, scheduler: Any = None, scaler: Any = None
    ) -> int:
        """Train on together with the processes that are left or came back, all of which call this.

        The module, and optimizer, scheduler and scaler if given, get the state of the process that has taken
        the most steps: it may be one ahead of the others, if a process was lost just as all agreed to take
        one. Gradients under `no_sync` are discarded. A process that is new makes its engine without a
        `process_group`, and then calls this too. Calls go on meanwhile; no step may be under way.

        Args:
            process_group: a new one, as for `DataParallel`.
            optimizer: what steps are taken with; all processes give it, or none.
            scheduler: likewise, of torch.optim.lr_scheduler.
            scaler: likewise, a torch.amp.GradScaler.

        Returns:
            How many steps have been taken together, accumulating ones included.

        Raises:
            ProcessGroupError: `process_group` is none, or this process is not in it.
            ProcessMismatchError: the modules of the processes are not alike; on all of them.
        """
        group = group_of(process_group)
        change = Use(self._route.parts(), changes=True, optimizer=optimizer)
        self._trainer.discard_accumulated()
        self._trainer.shared, num_done = await meet_again(
            group, self.module, (optimizer, scheduler, scaler), change, self._trainer.shared
        )
        return num_done

    def discard_accumulated(self) -> None:
        """Discard the gradients of steps under `no_sync` that no later step has used."""
        self._trainer.discard_accumulated()

    def statistics(self) -> DataParallelStatistics:
        """Return a snapshot of the engine and its runtime."""
        return DataParallelStatistics(
            num_passes=sum(route.num_passes for route in self._routes()),
            num_steps=self._trainer.num_steps,
            num_lanes=len(self._route.lanes),
            choices=(*self._choices(), *(each for view in self._views.values() for each in view._choices())),
            runtime=self.runtime.statistics(),
        )


def _check_num_lanes(num_lanes: int | str, available: int) -> int:
    if num_lanes in ("auto", "all"):
        return available
    if isinstance(num_lanes, bool) or not isinstance(num_lanes, int) or not 1 <= num_lanes <= available:
        raise ValueError(
            f'num_lanes must be "auto", "all" or a number from 1 to {available}, but got {shown(num_lanes)}. '
            "Name more devices to get more lanes."
        )
    return num_lanes
