"""Which model a worker of Ray's opens: checked where the program runs, opened where Ray places it."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from ray import cloudpickle
from torch import nn

from .._devices import Devices, parse_devices
from .._engine.data_parallel import DataParallel
from .._runtime import Runtime
from .._tree import map_leaves
from ..errors import JobUsageError
from ..infer.config import make_options, named_options
from ..infer.dtypes import InputDtypes, dtypes_of_model, parse_dtypes
from ..infer.job import open_model
from ..infer.model.models import InferenceModule, LoadedModel, module_made_by
from ..infer.model.task_options import TaskOptions
from ..infer.options import InferOptions
from ..infer.setup import make_steps
from ..infer.steps import Steps
from .resources import devices_of_worker

Model = str | os.PathLike[str] | nn.Module | Callable[[], nn.Module]

_OF_TASKS = frozenset(field.name for field in dataclasses.fields(TaskOptions))
# What makes a model of files: an object is what its maker made it.
_OF_FILES = _OF_TASKS | {"weights", "dtype", "autocast", "compile", "allow_unsafe_pickle"}
_OF_STEPS = frozenset({"preprocess", "collate", "postprocess", "input_dtype"})
OF_ROWS = frozenset({"batch_size", "max_batch_cost", "window", "workers", "on_error", "rename"})

# What a job has, and rows within Ray have not.
_NO_JOB = {"inputs": ("rows",), "output": "rows"}


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """A model to be opened, and how.

    Attributes:
        model: `package.module:factory`, a `.pt2` file or a Hugging Face folder, by path or URL; or a module,
            or a function that makes one.
        options: those of `asyncdp infer` that are about models and rows, by their names.
    """

    model: Model
    options: Mapping[str, Any]

    @classmethod
    def of(cls, model: Model, options: Mapping[str, Any], others: frozenset[str] = frozenset()) -> ModelPlan:
        """Check what can be checked without the model.

        Args:
            model: see the class.
            options: see the class.
            others: which options are known, beside those about models.

        Raises:
            JobUsageError: an option is unknown, or its value is of no use.
        """
        known = _OF_FILES | _OF_STEPS | others
        is_named = isinstance(model, str | os.PathLike)
        if not (is_named or isinstance(model, nn.Module) or callable(model)):
            raise JobUsageError(
                f"A {type(model).__qualname__} is no model",
                "Give a torch.nn.Module, a function that makes one, or the name of one as "
                "package.module:factory, a .pt2 file or a Hugging Face folder.",
            )
        for name in options:
            if name not in known:
                raise JobUsageError(
                    f"There is no option {name} here", f"There are {', '.join(sorted(known))}."
                )
            if name in _OF_FILES and not is_named:
                raise JobUsageError(
                    f"The option {name} is for models that are named",
                    "Let the function that makes the model do it, or give the model's name.",
                )
        named = named_options()
        checked = {name: named[name].convert(value) for name, value in options.items()}
        # A folder or file may lie where the workers are, and only there.
        of_task = {name: value for name, value in checked.items() if name in _OF_TASKS}
        TaskOptions(**of_task).check_choices()
        plan = cls(model, checked)
        plan._job_options("rows", {name: value for name, value in checked.items() if name not in of_task})
        return plan

    def check_can_be_sent(self) -> None:
        """Fail where Ray could not send the model to its workers.

        Raises:
            JobUsageError: with what pickle says.
        """
        if isinstance(self.model, str | os.PathLike):
            return
        try:
            cloudpickle.dump(self.model, _Nowhere())
        except Exception as error:
            raise JobUsageError(
                f"The model cannot be sent to Ray's workers: {type(error).__name__}: {error}",
                "Give a function that makes it there, or its name as package.module:factory.",
            ) from error

    def open(self, devices: Devices = None, hang_timeout: float | None = None) -> OpenModel:
        """Load the model and open an engine over the devices that Ray has given to this process.

        Args:
            devices: other ones; see `asyncdp.parse_devices`.
            hang_timeout: as `asyncdp.Runtime`.

        Raises:
            JobUsageError, ModelLoadError: the model or something that was named cannot be had.
            UnknownDeviceError, NoCudaDeviceError, NoDevicesError: a device cannot be used.
        """
        targets = devices_of_worker() if devices is None else parse_devices(devices)
        if isinstance(self.model, str | os.PathLike):
            options = self._job_options(os.fspath(self.model), self.options)
            loaded = open_model(options)
        else:
            options = self._job_options("rows", self.options)
            loaded = _made(self.model)
        # Made by the thread that has loaded the model, whose OpenMP threads it ends.
        runtime = Runtime(targets, hang_timeout=hang_timeout)
        return OpenModel(loaded, make_steps(options, "", loaded), runtime, options)

    def _job_options(self, model: str, options: Mapping[str, Any]) -> InferOptions:
        return make_options({**_NO_JOB, "model": model, **options})


class OpenModel:
    """A model with its engine, and the functions around it.

    Args:
        loaded: the model.
        steps: what is done to rows before and after it.
        runtime: the lanes it runs on; closed by `aclose`.
        options: sizes of batches, and what becomes of bad rows.
    """

    def __init__(self, loaded: LoadedModel, steps: Steps, runtime: Runtime, options: InferOptions) -> None:
        self.steps = steps
        self.options = options
        self.engine = DataParallel(loaded.module, output_device="cpu", runtime=runtime)
        self.has_steps = loaded.steps is not None or any(
            getattr(options, name) for name in ("preprocess", "collate", "postprocess")
        )
        self._dtypes = InputDtypes(parse_dtypes(options.input_dtype), loaded.input_dtypes)

    def tensors(self, tree: Any, name: str = "") -> Any:
        """Return nested inputs with tensors in the place of NumPy arrays.

        Doubles become what the model expects.

        Args:
            tree: one input of the model, or one for each of its names.
            name: of the input.

        Raises:
            ValueError: a number does not fit into the dtype.
        """
        if isinstance(tree, dict) and not name:
            return {key: self.tensors(value, str(key)) for key, value in tree.items()}
        return map_leaves(functools.partial(self._tensor, name), tree)

    def _tensor(self, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "biufc":
            return leaf
        if isinstance(leaf, np.ndarray) and not leaf.flags.writeable:
            leaf = leaf.copy()  # it lies in Ray's object store, and torch knows no read-only tensors
        return self._dtypes.tensor(leaf, name)

    async def aclose(self, timeout: float | None = None) -> None:
        """Drain what runs and end the lanes; `timeout` as `Runtime.aclose`."""
        await self.engine.runtime.aclose(timeout)


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing: a large model is not to be in memory twice, to see that it can be."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


def _made(model: Any) -> LoadedModel:
    name = getattr(model, "__qualname__", type(model).__qualname__)
    module = module_made_by(model, f"The function {name}")
    with torch.no_grad():
        module.eval().requires_grad_(False)
    return LoadedModel(
        InferenceModule(module, None, None, compile=False), {}, dtypes_of_model(module), made_by_code=True
    )
