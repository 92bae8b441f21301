"""What a person asked for, checked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path

from ..errors import JobUsageError
from .dtypes import parse_dtypes
from .model.models import DTYPES
from .output.writers import WRITERS
from .readers import FORMATS, STDIN, Dialect, Selection

_ALLOWED: dict[str, Collection[str]] = {
    "input_format": FORMATS,
    "output_format": WRITERS,
    "on_error": ("stop", "skip", "record"),
    "order": ("input", "completion"),
    "task": ("embed",),
    "dtype": DTYPES,
    "autocast": ("float16", "bfloat16"),
}
_ONE_OR_MORE = ("batch_size", "max_batch_cost", "window", "shard_size", "workers")
_LEAST = {"max_errors": 0, **dict.fromkeys(_ONE_OR_MORE, 1)}


@dataclasses.dataclass(frozen=True)
class InferOptions:
    """Options of one inference job; the command line has one flag for each.

    Attributes:
        inputs: paths, folders, patterns, or `-`.
        model: `package.module:factory`, a `.pt2` file, or a folder for `task="embed"`.
        output: folder for the shards.
        window: records that are sorted by length together.
        shard_size: records per block, hence per shard.
        encoding, delimiter, quote, allow_nan: see `readers.Dialect`.
        first_frame: whether further frames or pages of an image are left out.
        keep: columns of the input that are copied into the output.
        rename: new names of output columns, each as `old=new`.
        input_dtype: dtype of the numbers that the model gets, for all or as `name=dtype` by input.
        shard: part of the blocks to do, as `i/n` counting from 1.
    """

    inputs: tuple[str, ...]
    model: str
    output: Path
    weights: str | None = None
    task: str | None = None
    input_format: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    quote: str = '"'
    allow_nan: bool = False
    first_frame: bool = False
    output_format: str = "parquet"
    columns: tuple[str, ...] = ()
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
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
    input_dtype: str | None = None
    dtype: str | None = None
    autocast: str | None = None
    compile: bool = False
    on_error: str = "stop"
    max_errors: int | None = None
    shard: str | None = None
    resume: bool = False
    allow_unsafe_pickle: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise JobUsageError(f"{_flag(name)} is {value}", f"Give {least} or more.")
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                choices = ", ".join(allowed)
                raise JobUsageError(f"{_flag(name)} {value} is unknown", f"Choose one of {choices}.")
        if (self.task == "embed") != Path(self.model).is_dir():
            raise JobUsageError(
                f"--model {self.model} and --task {self.task} do not go together",
                "A Hugging Face folder needs --task embed, and --task embed needs such a folder.",
            )
        if self.resume and str(STDIN) in self.inputs:
            raise JobUsageError(
                "Standard input cannot be read a second time", "Save it to a file for jobs to be resumed."
            )
        if parse_dtypes(self.input_dtype) and (self.collate or self.task):
            raise JobUsageError(
                f"--input-dtype has no effect beside {'--collate' if self.collate else '--task'}",
                "Leave one of them out.",
            )
        for name in ("delimiter", "quote"):
            value = getattr(self.dialect, name)
            if value is not None and (len(value) != 1 or value in "\r\n"):
                raise JobUsageError(f"{_flag(name)} {value!r} is no single character", "Give one, as in ';'.")
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError:
            raise JobUsageError(
                f"--encoding {self.encoding} is unknown", "Give one of Python's, as cp1252 or utf-16."
            ) from None
        for entry in self.rename:
            if not all(entry.partition("=")):
                raise JobUsageError(f"--rename {entry} names no two columns", "Write old=new.")
        self.part  # noqa: B018  raises where --shard is no part

    @property
    def part(self) -> tuple[int, int]:
        """Index from 0, and number, of the parts that the job is split into."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise JobUsageError(f"--shard {self.shard} is no part", "Write 1/4, 2/4, 3/4, 4/4.")
        return int(match[1]) - 1, int(match[2])

    @property
    def selection(self) -> Selection:
        """Which columns the readers should pick."""
        return Selection(self.columns, self.id_column, self.keep)

    @property
    def dialect(self) -> Dialect:
        """How the text files are written."""
        delimiter = self.delimiter and self.delimiter.replace("\\t", "\t")
        return Dialect(self.encoding, delimiter, self.quote, self.allow_nan)

    @property
    def new_names(self) -> dict[str, str]:
        """New names of output columns by the old ones."""
        return dict(entry.split("=", 1) for entry in self.rename)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
