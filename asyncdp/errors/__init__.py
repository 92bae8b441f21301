"""Every public error. The class builds its message: the cause, then the remedy.

Each class also derives from a built-in one (`ValueError`, `TypeError`, `RuntimeError`), so that a plain
`except ValueError` catches it.
"""

from __future__ import annotations

from collections.abc import Iterable

from .._checks import shown
from .base import AsyncDPError as AsyncDPError
from .checkpoints import CheckpointError as CheckpointError
from .checkpoints import CheckpointMismatchError as CheckpointMismatchError
from .checkpoints import DamagedCheckpointError as DamagedCheckpointError
from .checkpoints import NotACheckpointError as NotACheckpointError
from .inputs import AmbiguousSequenceError as AmbiguousSequenceError
from .inputs import GatherError as GatherError
from .inputs import LengthMismatchError as LengthMismatchError
from .inputs import MetaTensorError as MetaTensorError
from .inputs import OffloadedModuleError as OffloadedModuleError
from .inputs import UnsplittableError as UnsplittableError
from .processes import PeerStepError as PeerStepError
from .processes import ProcessGroupError as ProcessGroupError
from .processes import ProcessMismatchError as ProcessMismatchError
from .serving import BatcherClosedError as BatcherClosedError
from .serving import CallCancelledError as CallCancelledError
from .serving import CallTimeoutError as CallTimeoutError
from .serving import CollateError as CollateError
from .serving import DuplicateNameError as DuplicateNameError
from .serving import EngineCancelledError as EngineCancelledError
from .serving import NestedCallError as NestedCallError
from .serving import NoLaneWorksError as NoLaneWorksError
from .serving import NotServableError as NotServableError
from .serving import OtherLoopError as OtherLoopError
from .serving import SplitError as SplitError

# --- devices ---------------------------------------------------------------------------------


class UnknownDeviceError(AsyncDPError, ValueError):
    """A device specification is malformed, or names a device that this machine does not have."""

    def __init__(self, spec: object, cause: str) -> None:
        super().__init__(
            f"cannot use device {shown(spec)}: {cause}. "
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


# --- arguments of a pass ---------------------------------------------------------------------


class NotAModuleError(AsyncDPError, TypeError):
    """The argument for the module is no `torch.nn.Module`."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"expected a torch.nn.Module, but got {type(got).__qualname__}. "
            "Wrap a function in a small Module, or run it with `await runtime.run(function, ...)`."
        )


class UnsupportedModuleError(AsyncDPError, TypeError):
    """The module is one of TorchScript, or has `__slots__`: replicas could not have their own of it."""

    def __init__(
        self,
        got: object,
        cause: str = "a TorchScript module has no structure to copy",
        remedy: str = "Use the original torch.nn.Module, or torch.export.",
    ) -> None:
        super().__init__(f"cannot replicate a {type(got).__qualname__}: {cause}. {remedy}")


class CompiledModuleError(UnsupportedModuleError):
    """The module was wrapped by `torch.compile`, whose code runs the wrapped module, never a replica."""

    def __init__(self) -> None:
        TypeError.__init__(
            self,
            "cannot replicate a module that torch.compile has wrapped: its compiled code belongs to the "
            "wrapped module. Pass the plain module, and decorate its forward with torch.compile.",
        )


class LazyModuleError(AsyncDPError, ValueError):
    """The module still has uninitialised parameters or buffers, or its forward makes some."""

    def __init__(self, name: str, cause: str = "the module has an uninitialised parameter or buffer") -> None:
        remedy = "Run one batch through the module itself first, so that it is there for all lanes"
        super().__init__(f"{cause} {name!r}, which would differ from lane to lane. {remedy}.")


class ParameterWrittenError(AsyncDPError, RuntimeError):
    """A forward wrote into a parameter whose memory other lanes were using."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"forward wrote its parameter {name!r} in place on lanes that share its memory, so that neither "
            "results nor weights are to be trusted. Load the weights again, and run one batch through the "
            "module itself first if it writes only once. Else keep what changes in a buffer, or use one lane."
        )


class CountMismatchError(AsyncDPError, ValueError):
    """The lists of `parallel_apply` differ in length."""

    def __init__(self, what: str, num_modules: int, num_given: int) -> None:
        super().__init__(
            f"Must have as many {what} as modules, but got {num_given} {what} for {num_modules} modules. "
            "Pass one entry per module."
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


# --- the life of a pass ----------------------------------------------------------------------


class StopIterationInLaneError(AsyncDPError, RuntimeError):
    """Code in a lane raised `StopIteration`, which a future cannot hold."""

    def __init__(self) -> None:
        super().__init__(
            "code in a lane raised StopIteration (the cause of this error). "
            "Call next() with a default, or catch StopIteration inside forward."
        )


class QueueFullError(AsyncDPError, RuntimeError):
    """A bounded queue has no room and the caller chose not to wait."""

    def __init__(self, what: str, limit: int, count: int = 1) -> None:
        cause = "is full" if count == 1 else f"has no room for {count} at once"
        super().__init__(
            f"the queue of {what} {cause} ({limit}). Await the call to wait for room, or raise the limit."
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


# --- kernels ---------------------------------------------------------------------------------


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


# --- batch inference -------------------------------------------------------------------------


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


class ProcessEndedError(AsyncDPError, RuntimeError):
    """Running a record ended the process that ran it: a crash in native code, or all of the memory."""

    def __init__(self) -> None:
        super().__init__(
            "running it alone ended its process three times. Run it by itself, in a process that can be "
            "watched: native code has crashed, or the memory was not enough."
        )


class MissingExtraError(AsyncDPError, ImportError):
    """A feature needs packages that an extra of asyncdp installs."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs the package {package}. Install it: pip install 'asyncdp[{extra}]'")


# --- training --------------------------------------------------------------------------------


class LossReductionError(AsyncDPError, ValueError):
    """The argument `loss_reduction` is neither `"mean"` nor `"sum"`."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f'loss_reduction must be "mean" or "sum", but got {shown(got)}. '
            "It says how loss_fn combines the rows of a batch; another kind of loss cannot be split."
        )


_REDUCE = 'Reduce it to a mean or a sum inside loss_fn, and name which one in loss_reduction="mean".'


class LossNotScalarError(AsyncDPError, ValueError):
    """The result of `loss_fn` is nothing that a backward can start from."""

    def __init__(self, got: object, remedy: str = _REDUCE) -> None:
        super().__init__(
            f"loss_fn must return one number as a tensor that depends on the parameters, but returned {got}. "
            f"{remedy}"
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


class NotAPairError(AsyncDPError, TypeError):
    """A batch to train on is not a pair of inputs and targets."""

    def __init__(self, number: int, got: object) -> None:
        kind = type(got).__qualname__
        what = f"a {kind} of {len(got)}" if isinstance(got, (tuple, list)) else f"a {kind}"
        super().__init__(
            f"batch {number} is {what}, but train() takes pairs of inputs and targets. Have the source give "
            "(inputs, targets); several inputs are a tuple within, and targets may be None."
        )


class NotASchedulerError(AsyncDPError, TypeError):
    """The argument for the learning rate scheduler cannot be stepped after each step of the optimizer."""

    def __init__(self, got: object, why: str | None = None) -> None:
        name = type(got).__qualname__
        problem = f"got {name}" if why is None else f"{name} {why}"
        super().__init__(
            f"expected a learning rate scheduler of the optimizer that is trained with, but {problem}. "
            "Pass one of torch.optim.lr_scheduler whose step() takes no arguments; step any other, "
            "ReduceLROnPlateau say, yourself in the loop over the steps."
        )


# --- traces ----------------------------------------------------------------------------------


class TraceFileError(AsyncDPError, ValueError):
    """A file is not a trace that asyncdp recorded."""

    def __init__(self, path: object, cause: BaseException) -> None:
        super().__init__(
            f"cannot read {path} as a trace: {type(cause).__name__}: {cause}. "
            "Name a file that `async with asyncdp.TraceRecorder(path)` wrote."
        )
