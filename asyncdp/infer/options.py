"""What a person asked for, checked."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection
from pathlib import Path

from ..errors import JobUsageError
from .dtypes import parse_dtypes
from .model.models import DTYPES
from .model.task_options import TaskOptions
from .option_fields import described, option
from .output.writers import WRITERS
from .places import fetched, place_of
from .readers import FORMATS, STDIN, Dialect, Selection
from .where import Subset, Where

_ALLOWED: dict[str, Collection[str]] = {
    "input_format": FORMATS,
    "output_format": WRITERS,
    "on_error": ("stop", "skip", "record"),
    "order": ("input", "completion"),
    "dtype": DTYPES,
    "autocast": ("float16", "bfloat16"),
}
_ONE_OR_MORE = ("ray_actors", "limit", "batch_size", "max_batch_cost", "window", "shard_size", "workers")
_LEAST = {"max_errors": 0, **dict.fromkeys(_ONE_OR_MORE, 1)}


@dataclasses.dataclass(frozen=True)
class InferOptions(TaskOptions):
    """Options of one inference job, those of its task included.

    Each is also a flag of the command line, an entry of its configuration file, and a keyword of `run`.

    Attributes:
        inputs: paths, folders, patterns, or `-`.
        model: `package.module:factory`, a `.pt2` file, or a Hugging Face folder.
        output: folder for the shards, by path or URL.
        window: records that are sorted by length together.
        shard_size: records per block, hence per shard.
        encoding, delimiter, quote, allow_nan, query: see `readers.Dialect`.
        first_frame: whether further frames or pages of an image are left out.
        keep: columns of the input that are copied into the output.
        rename: new names of output columns, each as `old=new`.
        where, sample, sample_seed, limit: which records the job is about, see `where.Subset`.
        input_dtype: dtype of the numbers that the model gets, for all or as `name=dtype` by input.
        shard: part of the blocks to do, as `i/n` counting from 1.
        ray: a Ray cluster to run on: `auto`, or its address; None for this machine.
        ray_actors: processes with a model over the whole cluster; None for one per node.
        ray_resources: what each of them takes, as JSON; None for an equal share of its node.
    """

    inputs: tuple[str, ...] = dataclasses.field(metadata=described("Files, folders, patterns, - for stdin."))
    model: str = dataclasses.field(metadata=described("module:factory, .pt2 or Hugging Face folder."))
    output: Path = dataclasses.field(metadata=described("Folder for the shards."))
    weights: str | None = option(None, "A .safetensors file for the factory's model.")
    input_format: str | None = option(None, "jsonl csv lines parquet npz images ...")
    query: str | None = option(None, "SQL for SQLite or DuckDB: SELECT a FROM input.")
    encoding: str | None = option(None, "Of text: cp1252, utf-16 ...; else UTF-8.")
    delimiter: str | None = option(None, "Between the fields of CSV.")
    quote: str = option('"', "Around fields of CSV.")
    allow_nan: bool = option(False, "Read NaN and Infinity in JSON.")
    first_frame: bool = option(False, "Leave out an image's further frames or pages.")
    output_format: str = option("parquet", "parquet arrow jsonl npy safetensors sqlite")
    columns: tuple[str, ...] = option((), "Column for the model; repeatable.", name="column")
    id_column: str | None = option(None, "Column with the id; else the row index.")
    keep: tuple[str, ...] = option((), "Column to copy to the output; repeatable.")
    rename: tuple[str, ...] = option((), "Of the output: old=new; repeatable.")
    where: str | None = option(None, "Condition: price > 3 and lang == 'de'.")
    sample: float | None = option(None, "Share of the records, 0.01, or number, 100.")
    sample_seed: int = option(0, "Which sample.")
    limit: int | None = option(None, "Most records, the first ones.")
    devices: str | None = option(None, "cpu*4, cuda, cuda:0,cuda:1 ...; else all.")
    batch_size: int = option(32, "Most records per batch.")
    max_batch_cost: int | None = option(None, "Most records times longest.")
    window: int = option(1024, "Records sorted by length together.")
    shard_size: int = option(4096, "Records per shard.")
    order: str = option("input", "Of rows: input or completion.")
    preprocess: str | None = option(None, "module:function, record to item.")
    collate: str | None = option(None, "module:function, items to arguments.")
    postprocess: str | None = option(None, "module:function, output to columns.")
    workers: int = option(1, "Workers that preprocess.")
    worker_processes: bool = option(False, "Use processes.")
    input_dtype: str | None = option(None, "Of the model's numbers: float32, or ids=int64,x=float32.")
    dtype: str | None = option(None, "float32, float16 or bfloat16.")
    autocast: str | None = option(None, "float16 or bfloat16.")
    compile: bool = option(False, "Compile the model.")
    on_error: str = option("stop", "stop, skip or record bad ones.")
    max_errors: int | None = option(None, "Give up after this many.")
    shard: str | None = option(None, "i/n: do part i of n; see merge.")
    ray: str | None = option(None, "auto or an address: run on a Ray cluster.")
    ray_actors: int | None = option(None, "Models on the cluster; else one per node.")
    ray_resources: str | None = option(None, 'Of each: {"CPU": 8, "GPU": 1}; else all of its node.')
    resume: bool = option(False, "Continue the job in --output.")
    allow_unsafe_pickle: bool = option(False, "Load weights from a pickle.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", place_of(self.output))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise JobUsageError(f"{_flag(name)} is {value}", f"Give {least} or more.")
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                remedy = f"Choose one of {', '.join(allowed)}."
                if (name, value) == ("output_format", "lance"):
                    remedy = "Write parquet or arrow, then run `asyncdp merge --output-format lance`."
                raise JobUsageError(f"{_flag(name)} {value} is unknown", remedy)
        self.check_choices()
        is_folder = Path(fetched(self.model)).is_dir()
        if self.task and not is_folder:
            raise JobUsageError(
                f"--model {self.model} and --task {self.task} do not go together",
                "A task needs a Hugging Face folder.",
            )
        if not is_folder:
            self.check_used(None)
        if self.resume and str(STDIN) in self.inputs:
            raise JobUsageError(
                "Standard input cannot be read a second time", "Save it to a file for jobs to be resumed."
            )
        if parse_dtypes(self.input_dtype) and (self.collate or is_folder):
            other = "--collate" if self.collate else "a Hugging Face folder"
            raise JobUsageError(
                f"--input-dtype has no effect beside {other}",
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
        _check_subset(self)
        for entry in self.rename:
            if not all(entry.partition("=")):
                raise JobUsageError(f"--rename {entry} names no two columns", "Write old=new.")
        _check_ray(self)
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
        return Selection(self.columns, self.id_column, self.keep, self.subset.where)

    @functools.cached_property
    def subset(self) -> Subset:
        """Which records the job is about."""
        where = None if self.where is None else Where.of(self.where)
        return Subset(where, self.sample, self.sample_seed, self.limit)

    @property
    def dialect(self) -> Dialect:
        """How the text files are written."""
        delimiter = self.delimiter and self.delimiter.replace("\\t", "\t")
        return Dialect(self.encoding, delimiter, self.quote, self.allow_nan, self.query)

    @property
    def new_names(self) -> dict[str, str]:
        """New names of output columns by the old ones."""
        return dict(entry.split("=", 1) for entry in self.rename)


def _check_subset(options: InferOptions) -> None:
    sample = options.sample
    if sample is not None and not (0 < sample < 1 or (sample >= 1 and sample == int(sample))):
        raise JobUsageError(
            f"--sample {sample} is neither a share nor a number of records", "Write 0.01 or 100."
        )
    if sample is not None and sample >= 1 and options.where is not None:
        raise JobUsageError(
            f"--sample {sample:g} beside --where would need all records to be read first",
            "Give a share, as in --sample 0.01, or --limit.",
        )
    if options.subset.chooses and options.limit is not None and options.part[1] > 1:
        raise JobUsageError(
            "--limit beside --where or --sample counts records that the other parts of a split job read",
            "Leave --shard or --limit out, or give a smaller --sample.",
        )


def _check_ray(options: InferOptions) -> None:
    if options.ray is None:
        for name in ("ray_actors", "ray_resources"):
            if getattr(options, name) is not None:
                raise JobUsageError(f"{_flag(name)} has no effect without --ray", "Give --ray auto.")
        return
    if not options.ray or options.ray.startswith("ray://"):
        raise JobUsageError(
            f"--ray {options.ray!r} is no address that a job can be started from",
            "Start it on a machine of the cluster, by `ray job submit` for instance, with --ray auto.",
        )
    if str(STDIN) in options.inputs:
        raise JobUsageError(
            "Standard input and --ray do not go together", "Save it to a file that all nodes see."
        )
    if options.subset.chooses and options.limit is not None:
        raise JobUsageError(
            "--limit beside --where or --sample counts records that other nodes read",
            "Leave --ray or --limit out, or give a smaller --sample.",
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
