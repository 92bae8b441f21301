"""Every public error. The class builds its message: the cause, then the remedy.

Each class also derives from a built-in one (`ValueError`, `TypeError`, `RuntimeError`), so that a plain
`except ValueError` catches it.
"""

from __future__ import annotations

from collections.abc import Iterable


class AsyncDPError(Exception):
    """Base class of every error that asyncdp itself raises."""


class UnknownDeviceError(AsyncDPError, ValueError):
    """A device specification is malformed, or names a device that this machine does not have."""

    def __init__(self, spec: object, cause: str) -> None:
        super().__init__(
            f"cannot use device {spec!r}: {cause}. "
            'Name devices as "cpu", "cpu*4", "cuda", "cuda:0,cuda:1" or a sequence of such names.'
        )


class NoCudaDeviceError(AsyncDPError, RuntimeError):
    """A CUDA device was named on a machine where torch sees none."""

    def __init__(self) -> None:
        super().__init__(
            "Expected at least one CUDA device to be available, but torch sees none. "
            'Check nvidia-smi and that torch is a CUDA build, or name CPU lanes: devices="cpu*2".'
        )


class NoDevicesError(AsyncDPError, ValueError):
    """The list of devices is empty."""

    def __init__(self) -> None:
        super().__init__(
            "the list of devices is empty. Name at least one device, or devices=None for the default."
        )


class NotAModuleError(AsyncDPError, TypeError):
    """The argument for the module is no `torch.nn.Module`."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"expected a torch.nn.Module, but got {type(got).__qualname__}. "
            "Wrap a function in a small Module, or run it with `await runtime.run(function, ...)`."
        )


class UnsupportedModuleError(AsyncDPError, TypeError):
    """The module is a TorchScript module, which has no Python structure to copy."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"cannot replicate a {type(got).__qualname__}: a TorchScript module has no structure to copy. "
            "Use the original torch.nn.Module, or torch.export."
        )


class CompiledModuleError(UnsupportedModuleError):
    """The module was wrapped by `torch.compile`, whose code runs the wrapped module, never a replica."""

    def __init__(self) -> None:
        TypeError.__init__(
            self,
            "cannot replicate a module that torch.compile has wrapped: its compiled code belongs to the "
            "wrapped module. Pass the plain module, and decorate its forward with torch.compile.",
        )


class LazyModuleError(AsyncDPError, ValueError):
    """The module still has uninitialised parameters or buffers."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the lazy module has an uninitialised parameter or buffer {name!r}. "
            "Run one batch through the module itself first, so that its shapes are known."
        )


class LengthMismatchError(AsyncDPError, ValueError):
    """Inputs of one pass differ in length along the dimension they are split on."""

    def __init__(self, dim: int, first: tuple[str, int], other: tuple[str, int]) -> None:
        super().__init__(
            f"inputs differ in length along dim {dim}: "
            f"{first[0]} has {first[1]} and {other[0]} has {other[1]}. "
            "Give every tensor the same length there, or pass what belongs to the whole batch "
            "as something other than a tensor with that dimension."
        )


class CountMismatchError(AsyncDPError, ValueError):
    """The lists of `parallel_apply` differ in length."""

    def __init__(self, what: str, num_modules: int, num_given: int) -> None:
        super().__init__(
            f"Must have as many {what} as modules, but got {num_given} {what} for {num_modules} modules. "
            "Pass one entry per module."
        )


class UnsplittableError(AsyncDPError, TypeError):
    """An input does not have its rows along one dimension; `name` is its name for the user."""

    def __init__(self, got: object, name: str = "an input") -> None:
        super().__init__(
            f"{name} is a {type(got).__qualname__}, which cannot be split along a dimension. "
            "Pass the padded tensor and the lengths, and pack inside forward."
        )


class GatherError(AsyncDPError, ValueError):
    """The outputs of the replicas do not fit together."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"cannot gather the outputs of the replicas: {cause}. "
            "Return the same structure from every shard, with tensors where values differ."
        )


class ReduceAddSizeError(AsyncDPError, ValueError):
    """The tensors of a ReduceAdd differ in size."""

    def __init__(self, first: Iterable[int], other: Iterable[int]) -> None:
        super().__init__(
            f"All inputs of ReduceAdd must have the same size, but got {list(first)} and {list(other)}. "
            "Check hooks and custom functions that change a gradient's shape."
        )


class ReduceAddDtypeError(AsyncDPError, ValueError):
    """The tensors of a ReduceAdd differ in dtype."""

    def __init__(self, first: object, other: object) -> None:
        super().__init__(
            f"All inputs of ReduceAdd must have the same dtype, but got {first} and {other}. "
            "Check hooks and custom functions that change a gradient's dtype."
        )


class ReduceAddInForwardError(AsyncDPError, RuntimeError):
    """ReduceAdd was used outside of a backward pass."""

    def __init__(self) -> None:
        super().__init__(
            "ReduceAdd can only be used during the backward pass of data parallel. "
            "Sum tensors in a forward with torch.stack(tensors).sum(0)."
        )


class StopIterationInLaneError(AsyncDPError, RuntimeError):
    """Code in a lane raised `StopIteration`, which a future cannot hold."""

    def __init__(self) -> None:
        super().__init__(
            "code in a lane raised StopIteration (the cause of this error). "
            "Call next() with a default, or catch StopIteration inside forward."
        )


class QueueFullError(AsyncDPError, RuntimeError):
    """A bounded queue has no room and the caller chose not to wait."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(
            f"the queue of {what} is full ({limit}). Await the call to wait for room, or raise the limit."
        )


class RuntimeClosedError(AsyncDPError, RuntimeError):
    """A pass was started on a runtime that is closed, closing, or was made before a fork."""

    def __init__(self, cause: str = "the runtime is closed") -> None:
        super().__init__(f"{cause}. Create a new Runtime, or start passes inside its `async with` block.")


class DeviceLostError(AsyncDPError, RuntimeError):
    """The device of a lane is lost; all its lanes are closed."""

    def __init__(self, lane: str, cause: str) -> None:
        super().__init__(
            f"lane {lane} is closed because its device was lost ({cause}). "
            "A CUDA context does not recover from this: restart the process."
        )


class LaneHungError(AsyncDPError, TimeoutError):
    """A pass was abandoned because a lane did not end its task in time."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(
            f"{what} had not ended after {seconds:.1f} s and was abandoned. Find out where it waits "
            "(py-spy dump), bound that wait, or allow more time."
        )


class NestedPassError(AsyncDPError, RuntimeError):
    """Code on a lane started a pass on the runtime that owns the lane."""

    def __init__(self, lane: str) -> None:
        super().__init__(
            f"code running on lane {lane} started a pass on the runtime that owns this lane, "
            "which could wait for itself for ever. Use another Runtime inside forward."
        )


class UnsupportedDtypeError(AsyncDPError, TypeError):
    """A kernel has no arithmetic for the dtype of its tensors."""

    def __init__(self, kernel: str, dtype: object) -> None:
        super().__init__(
            f"{kernel} cannot sum {dtype} tensors. "
            "Convert them first, for instance with tensor.to(torch.uint8) or tensor.to(torch.float32)."
        )


class KernelsUnavailableError(AsyncDPError, RuntimeError):
    """`ASYNCDP_KERNELS=numba` forces the compiled kernels, but part of what they need is missing."""

    def __init__(self, device: object, missing: Iterable[str], remedy: str) -> None:
        super().__init__(
            f"ASYNCDP_KERNELS=numba, but the compiled kernels cannot run on {device}: {'; '.join(missing)}. "
            f"{remedy}, or unset ASYNCDP_KERNELS to use the plain torch kernels."
        )


class JobError(AsyncDPError, RuntimeError):
    """A batch-inference job failed while it ran.

    Args:
        cause: what happened, without a closing full stop.
        remedy: what to do about it.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}. {remedy}")


class JobUsageError(JobError, ValueError):
    """A batch-inference job cannot start with the options it was given; nothing has run."""


class ModelLoadError(JobUsageError):
    """The model of a batch-inference job is missing, wrong or does not fit its weights."""


class OutputExistsError(JobUsageError):
    """The output folder already holds something."""

    def __init__(self, path: object) -> None:
        super().__init__(
            f"The output folder {path} is not empty",
            "Name another folder, empty this one, or continue its job with --resume.",
        )


class ResumeRefusedError(JobUsageError):
    """The journal in the output folder belongs to a different job, or cannot be trusted."""


class InputError(JobUsageError):
    """An input is missing, of an unknown format, or lacks a column."""


class DamagedInputError(JobError):
    """An input file is half-written, damaged, or of another format than said."""


class OutputError(JobError):
    """A shard could not be written: disk full, no permission, device gone."""


class RecordError(JobError):
    """A record was refused by its reader, its preprocessing or the model.

    Args:
        position: row index over all inputs, from 0.
        where: file and line or row, for a person to find it.
        error: the error of the reader, the preprocessing or the model.
    """

    def __init__(self, position: int, where: str, error: BaseException) -> None:
        self.position = position
        super().__init__(
            f"Record {position} ({where}) was refused: {type(error).__name__}: {error}",
            "Correct the record, or leave such records out with --on-error skip or --on-error record.",
        )


class TooManyBadRecordsError(JobError):
    """More records were refused than `--max-errors` allows."""

    def __init__(self, num_bad: int, limit: int, last: str) -> None:
        super().__init__(
            f"{num_bad} records were refused, more than the {limit} allowed; the last one with {last}",
            "With --on-error record they are listed in _errors-*.jsonl of the output: look at them, then "
            "continue with --resume and a higher --max-errors.",
        )


class MissingExtraError(AsyncDPError, ImportError):
    """A feature needs packages that an extra of asyncdp installs."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs the package {package}. Install it: pip install 'asyncdp[{extra}]'")


class LossReductionError(AsyncDPError, ValueError):
    """The argument `loss_reduction` is neither `"mean"` nor `"sum"`."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f'loss_reduction must be "mean" or "sum", but got {got!r}. '
            "It says how loss_fn combines the rows of a batch; another kind of loss cannot be split."
        )


class LossNotScalarError(AsyncDPError, ValueError):
    """The result of `loss_fn` is nothing that a backward can start from."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"loss_fn must return one number as a tensor that depends on the parameters, but returned {got}. "
            'Reduce it to a mean or a sum inside loss_fn, and name which one in loss_reduction="mean".'
        )


class ClosureOptimizerError(AsyncDPError, TypeError):
    """The optimizer evaluates the loss itself, as LBFGS does, and so cannot step on reduced gradients."""

    def __init__(self, optimizer: object) -> None:
        super().__init__(
            f"{type(optimizer).__qualname__} needs a closure that evaluates the loss again, which train_step "
            "cannot give it. Use another optimizer, or train_step(..., reduce_only=True) in your own loop."
        )


class NotAnOptimizerError(AsyncDPError, TypeError):
    """The argument for the optimizer has no `step` and `zero_grad`."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"expected an optimizer of torch.optim, but got {type(got).__qualname__}. "
            "Pass one over the module's parameters, or None together with reduce_only=True."
        )


class CollateError(AsyncDPError, ValueError):
    """The samples of one batch cannot be stacked."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"cannot make a batch: {cause}. "
            "Pass a value as pad= for tensors of different lengths, or a function of your own as collate=."
        )


class SplitError(AsyncDPError, ValueError):
    """The output of a batch cannot be split into one output per sample."""

    def __init__(self, cause: str, num_samples: int) -> None:
        super().__init__(
            f"{cause} of {num_samples} samples. "
            "Return one row per sample along dim 0, or pass a function of your own as split=."
        )


class CallTimeoutError(AsyncDPError, TimeoutError):
    """A call of a batcher was not answered in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"the call was not answered within {seconds} s. Allow more time, or send fewer calls at once."
        )


class CallCancelledError(AsyncDPError, RuntimeError):
    """A call of a batcher was awaited after it had been cancelled."""

    def __init__(self) -> None:
        super().__init__(
            "the call was given up, by its cancel() or because a task that awaited it was cancelled. "
            "Call again with the sample, and do not cancel a call whose result you need."
        )


class EngineCancelledError(AsyncDPError, RuntimeError):
    """The engine of a batcher raised an error that ends tasks or the process, `SystemExit` say."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            f"the engine raised {type(error).__name__} although it was not cancelled (the cause of this "
            "error). Catch it inside the engine: it would end the callers, or the process, for one sample."
        )


class BatcherClosedError(AsyncDPError, RuntimeError):
    """A batcher was called before or after its `async with` block."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"{cause}. Call it inside `async with batcher:`.")


class OtherLoopError(AsyncDPError, RuntimeError):
    """A batcher was called on another event loop than that of its `async with` block."""

    def __init__(self) -> None:
        super().__init__(
            "the batcher was entered on another event loop. "
            "Make one batcher per loop; they may share one engine or runtime."
        )


class NestedCallError(AsyncDPError, RuntimeError):
    """The async function of a batcher called this very batcher."""

    def __init__(self) -> None:
        super().__init__(
            "the async function of a batcher called the batcher that runs it, which could wait for itself "
            "for ever. Call the model itself there, or another Batcher."
        )


class NotServableError(AsyncDPError, TypeError):
    """The engine given to a batcher is neither a DataParallel nor callable."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"expected a DataParallel engine or something to call, but got {type(got).__qualname__}. "
            "Wrap a module in DataParallel, or pass a function of one batch."
        )


class TraceFileError(AsyncDPError, ValueError):
    """A file is not a trace that asyncdp recorded."""

    def __init__(self, path: object, cause: BaseException) -> None:
        super().__init__(
            f"cannot read {path} as a trace: {type(cause).__name__}: {cause}. "
            "Name a file that `async with asyncdp.TraceRecorder(path)` wrote."
        )
