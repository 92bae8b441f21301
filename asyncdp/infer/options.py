"""What a person asked for, checked."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from ..errors import JobUsageError
from .files import digest_large_file, digest_weights, times_of_large_files
from .models import DTYPES, LoadedModel
from .names import source_of
from .readers import FORMATS, STDIN, InputFile, Inputs, Selection
from .writers import WRITERS

ON_ERROR = ("stop", "skip", "record")
ORDERS = ("input", "completion")
TASKS = ("embed",)

TIMES = "times of large files"
"""The entry of a fingerprint that differs between machines even where all contents are the same."""

# These change which rows come out or how they are grouped into batches, which changes the last bits.
_FINGERPRINTED = (
    *("model", "task", "dtype", "autocast", "compile", "preprocess", "collate", "postprocess", "columns"),
    *("id_column", "batch_size", "max_batch_cost", "window", "shard_size", "output_format", "order"),
)


@dataclasses.dataclass(frozen=True)
class InferOptions:
    """Options of one inference job; the command line has one flag for each.

    Attributes:
        inputs: Paths, folders, patterns, or ``-``.
        model: ``package.module:factory``, a ``.pt2`` file, or a folder for ``task="embed"``.
        output: Folder for the shards.
        window: Records that are sorted by length together.
        shard_size: Records per block, hence per shard.
        shard: Part of the blocks to do, as ``i/n`` counting from 1.
    """

    inputs: tuple[str, ...]
    model: str
    output: Path
    weights: str | None = None
    task: str | None = None
    input_format: str | None = None
    output_format: str = "parquet"
    columns: tuple[str, ...] = ()
    id_column: str | None = None
    devices: str | None = None
    batch_size: int = 32
    max_batch_cost: int | None = None
    window: int = 1024
    shard_size: int = 4096
    order: str = "input"
    preprocess: str | None = None
    collate: str | None = None
    postprocess: str | None = None
    workers: int = 1
    worker_processes: bool = False
    dtype: str | None = None
    autocast: str | None = None
    compile: bool = False
    on_error: str = "stop"
    max_errors: int | None = None
    shard: str | None = None
    resume: bool = False
    allow_unsafe_pickle: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "window", "shard_size", "workers"):
            _at_least_one(name, getattr(self, name))
        if self.max_batch_cost is not None:
            _at_least_one("max_batch_cost", self.max_batch_cost)
        if self.max_errors is not None and self.max_errors < 0:
            raise JobUsageError(f"--max-errors is {self.max_errors}", "Give 0 or more.")
        _one_of("--input-format", self.input_format, tuple(FORMATS))
        _one_of("--output-format", self.output_format, tuple(WRITERS))
        _one_of("--on-error", self.on_error, ON_ERROR)
        _one_of("--order", self.order, ORDERS)
        _one_of("--task", self.task, TASKS)
        _one_of("--dtype", self.dtype, tuple(DTYPES))
        _one_of("--autocast", self.autocast, ("float16", "bfloat16"))
        if (self.task == "embed") != Path(self.model).is_dir():
            raise JobUsageError(
                f"--model {self.model} and --task {self.task} do not go together",
                "A Hugging Face folder needs --task embed, and --task embed needs such a folder.",
            )
        if self.resume and str(STDIN) in self.inputs:
            raise JobUsageError(
                "Standard input cannot be read a second time", "Save it to a file for jobs to be resumed."
            )
        self.part  # noqa: B018  checks the text of --shard

    @property
    def part(self) -> tuple[int, int]:
        """Index from 0, and number, of the parts that the work is split into."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise JobUsageError(f"--shard {self.shard} is no part", "Write 1/4, 2/4, 3/4, 4/4.")
        return int(match[1]) - 1, int(match[2])

    @property
    def selection(self) -> Selection:
        """Which columns the readers should pick."""
        return Selection(self.columns, self.id_column)


def fingerprint(options: InferOptions, inputs: Inputs, model: LoadedModel) -> dict[str, Any]:
    """Returns all that the outputs depend on, as plain JSON: options, code, weights and input.

    Devices, workers and the handling of errors are left out: a job may continue with others.
    """
    chosen = {name: getattr(options, name) for name in _FINGERPRINTED}
    chosen["input_format"] = inputs.format_name
    chosen["shard"] = list(options.part)
    if model.made_by_code:
        # Weights that the factory read from somewhere, or that it drew at random.
        chosen["model weights"] = digest_weights(model.module)
    else:
        chosen["model"] = None  # its files tell which one it is, wherever they lie
    files = {**model.files, **_sources(options)}
    chosen |= {name: digest_large_file(path) for name, path in files.items()}
    chosen["input"] = [_input_entry(file) for file in inputs.files]
    on_disk = [file.path for file in inputs.files if file.path != STDIN]
    chosen[TIMES] = times_of_large_files([*files.values(), *on_disk])
    plain: dict[str, Any] = json.loads(json.dumps(chosen))
    return plain


def _sources(options: InferOptions) -> dict[str, Path]:
    """Returns the files with the functions around the model."""
    named = {name: getattr(options, name) for name in ("preprocess", "collate", "postprocess")}
    found = {name: source_of(spec, f"--{name}") for name, spec in named.items() if spec}
    return {f"{name} file {source.name}": source for name, source in found.items() if source}


def _input_entry(file: InputFile) -> list[Any]:
    if file.path == STDIN:
        return ["-"]
    # By name and contents: the folder may move between machines and runs.
    try:
        return [file.path.name, file.path.stat().st_size, digest_large_file(file.path)]
    except OSError as error:
        raise file.broken(error) from error


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise JobUsageError(f"--{name.replace('_', '-')} is {value}", "Give 1 or more.")


def _one_of(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise JobUsageError(f"{option} {value} is unknown", f"Choose one of {', '.join(allowed)}.")
