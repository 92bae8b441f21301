"""Models from a factory, an exported program or a Hugging Face folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from asyncdp.errors import JobUsageError, ModelLoadError
from asyncdp.infer.names import load_name, source_of

if TYPE_CHECKING:
    from asyncdp.infer.options import InferOptions

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the files it came from.

    Attributes:
        module: Runs without gradients; safe to replicate over lanes.
        files: What its behaviour depends on, for the fingerprint.
    """

    module: nn.Module
    files: tuple[Path, ...]


class InferenceModule(nn.Module):
    """Runs a module in inference mode, with autocast and dtype applied in whatever thread it is called."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype | None, autocast: torch.dtype | None, compile: bool
    ) -> None:
        super().__init__()
        self.module = module
        self._dtype = dtype
        self._autocast = autocast
        self._compile = compile

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module; floating-point inputs are cast to the chosen dtype."""
        if self._compile:
            # Compiled once per replica, in its lane; copies of a module lose a compilation.
            self.module.compile(dynamic=True)
            self._compile = False
        args, kwargs = self._cast(args), self._cast(kwargs)
        with torch.inference_mode(), self._autocasting():
            return self.module(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if self._dtype is None:
            return value
        if isinstance(value, torch.Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {name: self._cast(entry) for name, entry in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._cast(entry) for entry in value)
        return value

    def _autocasting(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        device = next((tensor.device.type for tensor in self.parameters()), "cpu")
        return torch.autocast(device, self._autocast)


def load_model(options: InferOptions) -> LoadedModel:
    """Loads the model that the options name, on the CPU.

    Raises:
        ModelLoadError: When it is missing, no module, damaged, or does not fit its weights.
    """
    spec = options.model
    module: nn.Module
    if Path(spec).is_dir():
        from asyncdp.infer.embed import load_embedder

        module, files = load_embedder(Path(spec))
    elif spec.endswith(".pt2"):
        path = _existing(Path(spec), "model")
        module, files = load_exported(path, allow_pickle=options.allow_unsafe_pickle), (path,)
    else:
        module, files = _from_factory(spec)
    if options.weights:
        path = _existing(Path(options.weights), "weights")
        load_weights(module, path, allow_pickle=options.allow_unsafe_pickle)
        files = (*files, path)
    return LoadedModel(_prepared(module, options), files)


def _prepared(module: nn.Module, options: InferOptions) -> nn.Module:
    # An exported program is already in the mode it was exported in, and says so by raising.
    with contextlib.suppress(NotImplementedError):
        module.eval()
    module.requires_grad_(False)
    dtype = DTYPES.get(options.dtype or "")
    if dtype is not None:
        module.to(dtype)
    return InferenceModule(module, dtype, DTYPES.get(options.autocast or ""), options.compile)


def _from_factory(spec: str) -> tuple[nn.Module, tuple[Path, ...]]:
    if ":" not in spec:
        raise ModelLoadError(
            f"There is no model {spec}",
            "Name a factory as package.module:name, a .pt2 file, or a folder with --task embed.",
        )
    factory = load_name(spec, "--model")
    try:
        module = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise ModelLoadError(
            f"The factory {spec} failed with {type(error).__name__}: {error}",
            "It is called without arguments and must return a torch.nn.Module.",
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelLoadError(
            f"The factory {spec} returned {type(module).__name__}", "It must return a torch.nn.Module."
        )
    source = source_of(spec, "--model")
    return module, (source,) if source else ()


def load_weights(module: nn.Module, path: Path, *, allow_pickle: bool) -> None:
    """Loads weights into ``module``: safetensors, or a pickle when that was allowed by name.

    Raises:
        ModelLoadError: When the file is damaged, is a pickle, or names other parameters.
    """
    import safetensors.torch

    try:
        if path.suffix == ".safetensors":
            safetensors.torch.load_model(module, path)
        elif allow_pickle:
            module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            raise ModelLoadError(
                f"{path} is not a .safetensors file, and a pickle can run any code while it loads",
                "Convert it to safetensors, or give --allow-unsafe-pickle if you trust whoever made it.",
            )
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"The weights {path} do not fit or cannot be read: {_first_lines(error)}",
            "Check that they were saved from the model that --model makes.",
        ) from error


def _first_lines(error: Exception, limit: int = 600) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def load_exported(path: Path, *, allow_pickle: bool) -> nn.Module:
    """Loads a program saved by ``torch.export.save``.

    Raises:
        ModelLoadError: When it is damaged, or holds native code or pickles that were not allowed.
    """
    try:
        if not allow_pickle:
            _refuse_pickles(path)
        with _weights_only_loading():
            return torch.export.load(path).module()
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"{path} cannot be loaded as an exported program: {type(error).__name__}: {_first_lines(error)}",
            "Make it with torch.export.save(torch.export.export(...), path).",
        ) from error


# What torch.export.save writes when nothing in it needs a pickle, apart from the example inputs, which
# load with weights_only.
_PLAIN_MEMBER = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/.*|version"
    r"|models/[^/]+\.json|data/sample_inputs/[^/]+\.pt"
    r"|data/weights/([^/]*_config\.json|weight_\d+)"
    r"|data/constants/([^/]*_config\.json|tensor_\d+)"
    r"|extra/.*)"
)


def _refuse_pickles(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if min(member.header_offset for member in archive.infolist()) != 0:
            # A file that lost its end shows an archive inside it instead of itself.
            raise zipfile.BadZipFile("the archive does not begin where the file does")
        for name in archive.namelist():
            if not _PLAIN_MEMBER.fullmatch(name) or (
                name.endswith("_config.json") and '"use_pickle": true' in _normal_json(archive, name)
            ):
                raise ModelLoadError(
                    f"{path} holds {name}, which would load a pickle or native code",
                    "Export the model again, or give --allow-unsafe-pickle if you trust whoever made it.",
                )


def _normal_json(archive: zipfile.ZipFile, name: str) -> str:
    return json.dumps(json.loads(archive.read(name)))


@contextlib.contextmanager
def _weights_only_loading() -> Iterator[None]:
    """Holds torch.export's own calls of torch.load, some of which ask for any pickle, to weights only."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ModelLoadError(f"There is no {what} file {path}", f"Check the path given with --{what}.")
    return path


def dtype_named(name: str | None, option: str) -> None:
    """Checks the name of a dtype.

    Raises:
        JobUsageError: When it is none of `DTYPES`.
    """
    if name is not None and name not in DTYPES:
        raise JobUsageError(f"{option} {name} is unknown", f"Choose one of {', '.join(DTYPES)}.")
