"""What a person asked for, checked."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ..errors import JobUsageError
from .model.models import DTYPES
from .output.writers import WRITERS
from .readers import FORMATS, STDIN, Selection

ON_ERROR = ("stop", "skip", "record")
ORDERS = ("input", "completion")
TASKS = ("embed",)

TIMES = "times of large files"
"""The entry of a fingerprint that differs between machines even where all contents are the same."""


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


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise JobUsageError(f"--{name.replace('_', '-')} is {value}", "Give 1 or more.")


def _one_of(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise JobUsageError(f"{option} {value} is unknown", f"Choose one of {', '.join(allowed)}.")
