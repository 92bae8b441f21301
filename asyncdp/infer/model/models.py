"""Models from a factory, an exported program or a Hugging Face folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._torch_private import compiler_error
from ..._tree import map_leaves
from ...errors import JobError, JobUsageError, ModelLoadError
from ..dtypes import dtypes_of_model
from ..places import fetched
from ..steps import Steps
from .exported import load_exported
from .names import brief, load_name, source_of
from .task_options import TaskOptions
from .tasks import load_task
from .weights import load_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the files it came from.

    Attributes:
        module: runs without gradients; safe to replicate over lanes.
        files: what its behaviour depends on, by what it is, for the fingerprint.
        input_dtypes: what it expects of its inputs by their names, "" for all others.
        made_by_code: whether its weights may come from elsewhere than `files`.
        steps: what stands around the model of a folder.
    """

    module: nn.Module
    files: Mapping[str, Path]
    input_dtypes: Mapping[str, torch.dtype]
    made_by_code: bool = False
    steps: Steps | None = None


class _CompiledCalls:
    """The compiled call of every replica of a module, made once, by the lane that has the replica.

    A replica itself cannot hold it: what a forward sets on a module is undone after it. All replicas share
    this object, since a copy of it is itself.
    """

    def __init__(self) -> None:
        self._calls: dict[int, tuple[nn.Module, Callable[..., Any]]] = {}

    def __deepcopy__(self, memo: object) -> _CompiledCalls:
        return self

    def of(self, module: nn.Module) -> Callable[..., Any]:
        """Return the compiled call of a replica."""
        known = self._calls.get(id(module))
        if known is None:
            known = self._calls[id(module)] = (module, torch.compile(module.__call__, dynamic=True))
        return known[1]


class InferenceModule(nn.Module):
    """Runs a module in inference mode, with autocast and dtype applied in whatever thread it is called."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype | None, autocast: torch.dtype | None, compile: bool
    ) -> None:
        super().__init__()
        self.module = module
        self._dtype = dtype
        self._autocast = autocast
        self._compiled = _CompiledCalls() if compile else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; floating-point inputs are cast to the chosen dtype."""
        if self._dtype is not None:
            args, kwargs = map_leaves(self._cast, (args, kwargs))
        with torch.inference_mode(), self._autocasting():
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            return self.module(*args, **kwargs)
        call = self._compiled.of(self.module)
        try:
            return call(*args, **kwargs)
        except compiler_error() as error:
            # No record is at fault, and halving a batch would only compile again.
            raise JobError(
                f"--compile failed with {type(error).__name__}: {brief(error)}",
                "Leave --compile out, or make the model one that torch.compile takes.",
            ) from error

    def _cast(self, leaf: Any) -> Any:
        is_float = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(self._dtype) if is_float else leaf

    def _autocasting(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        device = next((tensor.device.type for tensor in self.parameters()), "cpu")
        return torch.autocast(device, self._autocast)


def load_model(
    spec: str,
    task_options: TaskOptions | None = None,
    *,
    weights: str | None = None,
    dtype: str | None = None,
    autocast: str | None = None,
    compile: bool = False,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load a model on the CPU.

    Args:
        spec: `package.module:factory`, a `.pt2` file, or a Hugging Face folder, by path or URL.
        task_options: what to do with a folder.
        weights: file with its weights, None for those that it comes with.
        dtype: one of `DTYPES` for weights and inputs, None for those that it has.
        autocast: one of `DTYPES` for autocast, None for no autocast.
        compile: whether every replica is compiled.
        allow_pickle: whether a pickle may be loaded.

    Raises:
        ModelLoadError: it is missing, no module, damaged, or does not fit its weights.
    """
    module: nn.Module
    if compile:
        _check_compiler()
    spec, weights = fetched(spec), weights and fetched(weights)
    is_folder, is_exported = Path(spec).is_dir(), spec.endswith(".pt2")
    steps = None
    if is_folder:
        task = load_task(
            Path(spec), task_options or TaskOptions(), compile=compile, allow_pickle=allow_pickle
        )
        module, files, steps = task.module, task.files, task.steps
    elif is_exported:
        path = _existing(Path(spec), "model")
        module, files = load_exported(path, allow_pickle=allow_pickle), {"model file": path}
    else:
        module, files = _from_factory(spec)
    if weights:
        files["weights"] = _existing(Path(weights), "weights")
        load_weights(module, files["weights"], allow_pickle=allow_pickle)
    # An exported program is already in the mode it was exported in, and raises.
    with contextlib.suppress(NotImplementedError):
        module.eval()
    module.requires_grad_(False)
    # Half a precision is the model's own affair: what it gets is cast in its lane.
    expected = dtypes_of_model(module) if dtype is None else _cast_later(dtypes_of_model(module))
    if dtype is not None:
        module.to(DTYPES[dtype])
    module = InferenceModule(module, DTYPES.get(dtype or ""), DTYPES.get(autocast or ""), compile)
    return LoadedModel(module, files, expected, not (is_folder or is_exported), steps)


def _cast_later(dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    return {name: torch.float32 if dtype.is_floating_point else dtype for name, dtype in dtypes.items()}


def _check_compiler() -> None:
    """Fail before the job when what torch.compile makes CPU code with is missing."""
    if torch.cuda.is_available():
        return
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise JobUsageError(
            f"--compile needs a C++ compiler, and there is no {compiler}",
            "Install one, name it in the environment variable CXX, or leave --compile out.",
        )


def _from_factory(spec: str) -> tuple[nn.Module, dict[str, Path]]:
    if Path(spec).is_file():
        raise ModelLoadError(
            f"{spec} is no exported program (.pt2), and no other file is loaded as a model",
            "Name a factory as package.module:name, and give the file to --weights.",
        )
    if ":" not in spec:
        raise ModelLoadError(
            f"There is no model {spec}",
            "Name a factory as package.module:name, a .pt2 file, or a Hugging Face folder.",
        )
    factory = load_name(spec, "--model")
    module = module_made_by(factory, f"The factory {spec}")
    source = source_of(spec, "--model")
    return module, {f"model file {source.name}": source} if source else {}


def module_made_by(factory: Any, what: str) -> nn.Module:
    """Return a module itself, or the one that a factory makes.

    Raises:
        ModelLoadError: `what` it is called has failed, or made no module.
    """
    try:
        module = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise ModelLoadError(
            f"{what} failed with {type(error).__name__}: {error}",
            "It is called without arguments and must return a torch.nn.Module.",
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelLoadError(f"{what} returned {type(module).__name__}", "It must return a torch.nn.Module.")
    return module


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ModelLoadError(f"There is no {what} file {path}", f"Check the path given with --{what}.")
    return path
