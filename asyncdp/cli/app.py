"""The commands and their options."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ..errors import AsyncDPError
from ..infer import InferOptions
from .running import EXIT_INTERRUPTED, Abandoned, Interrupted, exit_code_of, run_infer

_WIDTH = 100

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH},
    help="Run PyTorch models over a lot of data, on all devices of one machine.",
)

_EXAMPLE = """Example:  asyncdp infer lines.txt --model ./minilm --task embed --output out

Exit codes: 0 all done, 1 failed, 2 usage, 3 done with bad records, 130 interrupted;
after 1 and 130 the same command with --resume continues."""


@app.command(epilog=_EXAMPLE)
def infer(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, patterns, - for stdin.")],
    model: Annotated[str, typer.Option(help="module:factory, .pt2 or folder to embed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the shards.")],
    weights: Annotated[str | None, typer.Option(help="A .safetensors file for the factory's model.")] = None,
    task: Annotated[str | None, typer.Option(help="embed: text to vectors, --model is a HF folder.")] = None,
    input_format: Annotated[str | None, typer.Option(help="jsonl csv lines parquet npz images ...")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of text: cp1252, utf-16 ...; else UTF-8.")] = None,
    delimiter: Annotated[str | None, typer.Option(help="Between the fields of CSV.")] = None,
    quote: Annotated[str, typer.Option(help="Around fields of CSV.")] = '"',
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="Read NaN and Infinity in JSON.")] = False,
    first_frame: Annotated[
        bool, typer.Option("--first-frame", help="Leave out an image's further frames or pages.")
    ] = False,
    output_format: Annotated[str, typer.Option(help="parquet jsonl npy safetensors")] = "parquet",
    column: Annotated[list[str] | None, typer.Option(help="Column for the model; repeatable.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column with the id; else the row index.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Column to copy to the output; repeatable.")] = None,
    rename: Annotated[list[str] | None, typer.Option(help="Of the output: old=new; repeatable.")] = None,
    devices: Annotated[str | None, typer.Option(help="cpu*4, cuda, cuda:0,cuda:1 ...; else all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Most records per batch.")] = 32,
    max_batch_cost: Annotated[int | None, typer.Option(help="Most records times longest.")] = None,
    window: Annotated[int, typer.Option(help="Records sorted by length together.")] = 1024,
    shard_size: Annotated[int, typer.Option(help="Records per shard.")] = 4096,
    order: Annotated[str, typer.Option(help="Of rows: input or completion.")] = "input",
    preprocess: Annotated[str | None, typer.Option(help="module:function, record to item.")] = None,
    collate: Annotated[str | None, typer.Option(help="module:function, items to arguments.")] = None,
    postprocess: Annotated[str | None, typer.Option(help="module:function, output to columns.")] = None,
    workers: Annotated[int, typer.Option(help="Workers that preprocess.")] = 1,
    worker_processes: Annotated[bool, typer.Option("--worker-processes", help="Use processes.")] = False,
    input_dtype: Annotated[
        str | None, typer.Option(help="Of the model's numbers: float32, or ids=int64,x=float32.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    autocast: Annotated[str | None, typer.Option(help="float16 or bfloat16.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model.")] = False,
    on_error: Annotated[str, typer.Option(help="stop, skip or record bad ones.")] = "stop",
    max_errors: Annotated[int | None, typer.Option(help="Give up after this many.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: do part i of n; see merge.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the job in --output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, run one batch.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture of rate and load, .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Log and summary as JSON lines.")] = False,
    allow_unsafe_pickle: Annotated[
        bool, typer.Option("--allow-unsafe-pickle", help="Load weights from a pickle.")
    ] = False,
) -> None:
    """Run a model over all records of some files."""
    given = {**locals(), "inputs": tuple(inputs), "columns": tuple(column or ())}
    given |= {"keep": tuple(keep or ()), "rename": tuple(rename or ())}
    with _exit_codes(as_json=as_json):
        options = InferOptions(
            **{field.name: given[field.name] for field in dataclasses.fields(InferOptions)}
        )
        raise typer.Exit(run_infer(options, dry_run=dry_run, plot=plot, as_json=as_json))


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="Output folders of all parts of one job.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the whole.")],
) -> None:
    """Join the outputs of infer --shard i/n, and check that nothing is missing."""
    with _exit_codes():
        from ..infer.output.merge import merge_parts

        merged = merge_parts(parts, output)
        print(f"{merged.num_records:,} records, {merged.num_bad:,} of them bad, in {output}")
        raise typer.Exit(exit_code_of(merged.num_bad))


@app.command()
def devices(
    spec: Annotated[str | None, typer.Argument(help="As for infer --devices; else the default.")] = None,
) -> None:
    """Show the lanes, their memory, peer access and kernels."""
    with _exit_codes():
        from .devices import describe_devices

        print(describe_devices(spec))


trace_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at recorded traces.")
app.add_typer(trace_app, name="trace")


@trace_app.command("summary")
def trace_summary(
    file: Annotated[Path, typer.Argument(help="A file that asyncdp.TraceRecorder wrote.")],
) -> None:
    """Show, per lane and kind of task, counts, times and shares of a trace."""
    with _exit_codes():
        from .trace_summary import summarize

        print(summarize(file))


@contextlib.contextmanager
def _exit_codes(*, as_json: bool = False) -> Iterator[None]:
    """End the process with the code of what was raised; print an error of asyncdp in one line."""
    # Raised by torch itself when it copies an exported program.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    try:
        yield
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        _leave_at_once(EXIT_INTERRUPTED)
    except Abandoned as abandoned:
        _leave_at_once(_print_error(abandoned.error, as_json=as_json))
    except KeyboardInterrupt:  # before the job began, or after its end
        print("interrupted", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except AsyncDPError as error:
        raise typer.Exit(_print_error(error, as_json=as_json)) from None


def _print_error(error: AsyncDPError, *, as_json: bool) -> int:
    """Print an error; return the exit code for it."""
    code = exit_code_of(0, error)
    print(f"error: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"event": "error", "code": code, "text": str(error)}))
    return code


def _leave_at_once(code: int) -> NoReturn:
    """End without waiting for threads: one may read standard input for ever. All output is on the disk."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
