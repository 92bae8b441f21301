"""What the outputs of a job depend on: its identity when it is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .files import digest_file, new_digest
from .model.models import LoadedModel
from .model.names import source_of
from .model.task_options import TaskOptions
from .options import InferOptions
from .output.journal import CONTENTS, SAMPLED_TIMES, TIMES
from .places import find, is_remote, open_place
from .readers import STDIN, InputFile, Inputs

WHOLE_BELOW = 256 << 20
"""Bytes from which on a file is compared by samples, and by its time where that stays the same."""

_SAMPLE = 1 << 20
_NUM_SAMPLES = 64
_SHARE = 32
"""One part in so many of each input file is read for the fingerprint of a job that is split."""

_READ_AT_ONCE = 64 << 10
"""Bytes up to which a file is read whole, and its samples taken from that."""

# These change which rows come out or how they are grouped into batches, which changes the last bits.
_FINGERPRINTED = (
    *(
        "model",
        *(field.name for field in dataclasses.fields(TaskOptions) if field.name != "calibration"),
        "input_dtype",
        "dtype",
        "autocast",
        "compile",
        "preprocess",
        "collate",
        "postprocess",
        "columns",
    ),
    *(
        "id_column",
        "keep",
        "where",
        "sample",
        "sample_seed",
        "limit",
        "rename",
        "query",
        "encoding",
        "delimiter",
        "quote",
        "allow_nan",
        "first_frame",
        "batch_size",
        "max_batch_cost",
        "window",
        "shard_size",
        "output_format",
        "order",
    ),
)


class ModelPrint(NamedTuple):
    """What the outputs depend on besides options and input, as found where the model is.

    Attributes:
        digests: of weights and files, by what they are.
        times: name and time of change of each large file.
    """

    digests: dict[str, str | None]
    times: list[tuple[str, int]]


def model_print(options: InferOptions, model: LoadedModel) -> ModelPrint:
    """Return the part of a fingerprint that is about the model, and the functions around it."""
    files = {**model.files, **_sources(options)}
    digests: dict[str, str | None] = {name: digest_contents(path) for name, path in files.items()}
    if model.made_by_code:
        # Weights that the factory read from somewhere, or that it drew at random.
        digests["model weights"] = _digest_weights(model.module)
    else:
        digests["model"] = None  # its files identify it, wherever they lie
    return ModelPrint(digests, _times(files.values(), WHOLE_BELOW))


def fingerprint(options: InferOptions, inputs: Inputs, model: ModelPrint) -> dict[str, Any]:
    """Return all that the outputs depend on, as plain JSON: options, code, weights and input.

    Devices, machines, workers and the handling of errors are left out: a job may continue with others.
    """
    chosen = {name: getattr(options, name) for name in _FINGERPRINTED}
    chosen["input_format"] = inputs.format_name
    chosen["shard"] = options.part
    chosen |= model.digests
    on_disk = [file for file in inputs.files if file.path != STDIN]
    paths = [file.path for file in on_disk if not is_remote(file.path)]
    is_split = options.part[1] > 1
    chosen["input"] = [_input_entry(file) for file in inputs.files]
    chosen[CONTENTS] = None if is_split else [(f.path.name, _digest_of(f, digest_contents)) for f in on_disk]
    chosen[SAMPLED_TIMES] = _times(paths, 0) if is_split else None
    chosen[TIMES] = [*model.times, *_times(paths, WHOLE_BELOW)]
    plain: dict[str, Any] = json.loads(json.dumps(chosen))
    return plain


def _sources(options: InferOptions) -> dict[str, Path]:
    """Return the files with the functions around the model, and others that outputs depend on."""
    named = {name: getattr(options, name) for name in ("preprocess", "collate", "postprocess")}
    found = {name: source_of(spec, f"--{name}") for name, spec in named.items() if spec}
    sources = {f"{name} file {source.name}": source for name, source in found.items() if source}
    return sources | ({"calibration": Path(options.calibration)} if options.calibration else {})


def _input_entry(file: InputFile) -> list[Any]:
    if file.path == STDIN:
        return ["-"]
    # By name and contents: the folder may move between machines and runs.
    return [file.path.name, file.num_bytes, _digest_of(file, _digest_few_samples)]


def _digest_of(file: InputFile, digest: Callable[[Path], str]) -> str:
    if file.tag is not None:
        return file.tag
    try:
        return digest(file.path)
    except OSError as error:
        raise file.broken(error) from error


def _digest_weights(module: nn.Module) -> str:
    """Return a digest of all parameters and buffers, names included."""
    digest = new_digest()
    for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        # What has no plain bytes (sparse, quantized, not yet initialized) counts by name and type only.
        with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError):
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_contents(path: Path) -> str:
    """Return a digest of a file: of all bytes, or of size and samples where that would take too long."""
    size = find(path).num_bytes
    return digest_file(path) if size < WHOLE_BELOW else _digest_samples(path, size, _SAMPLE)


def _digest_few_samples(path: Path) -> str:
    """Return a digest of a small share of a file, for a machine that is to read a part of it only."""
    size = find(path).num_bytes
    return _digest_samples(path, size, min(size // (_NUM_SAMPLES * _SHARE) + 1, _SAMPLE))


def _digest_samples(path: Path, size: int, num_bytes: int) -> str:
    digest = new_digest(str(size).encode())
    with open_place(path, in_order=False) as file:
        if not file.seekable():  # a server that gives whole files only
            return digest_file(path)
        source = io.BytesIO(file.read()) if size <= _READ_AT_ONCE else file
        for index in range(_NUM_SAMPLES):
            source.seek(max(size - num_bytes, 0) * index // (_NUM_SAMPLES - 1))
            digest.update(source.read(num_bytes))
    return digest.hexdigest()


def _times(paths: Iterable[Path], least: int) -> list[tuple[str, int]]:
    """Return name and time of change (ns) of each file of at least so many bytes."""
    found = [(path.name, path.stat()) for path in paths]
    return [(name, status.st_mtime_ns) for name, status in found if status.st_size >= least]
