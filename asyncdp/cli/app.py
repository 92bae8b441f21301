"""The commands and their options."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..errors import AsyncDPError
from .infer_command import run_command, signature
from .running import EXIT_INTERRUPTED, Abandoned, Interrupted, exit_code_of

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


def infer(context: typer.Context, **given: Any) -> None:
    """Run a model over all records of some files."""
    with _exit_codes(as_json=given["json"]):
        raise typer.Exit(run_command(context, given))


infer.__signature__ = signature()  # type: ignore[attr-defined]
app.command(epilog=_EXAMPLE)(infer)


@app.command()
def report(
    output: Annotated[str, typer.Argument(help="Output folder of a job, running or not.")],
    picture: Annotated[Path | None, typer.Option(help="Draw rate and load, .png or .svg.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write all as one HTML page.")] = None,
) -> None:
    """Show how a job goes or went."""
    with _exit_codes():
        from .report import show_report

        print(show_report(output, picture, html))


@app.command()
def merge(
    parts: Annotated[list[str], typer.Argument(help="Output folders of all parts of one job.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the whole.")],
    output_format: Annotated[str | None, typer.Option(help="lance: one data set; else as the parts.")] = None,
) -> None:
    """Join the outputs of infer --shard i/n, and check that nothing is missing."""
    with _exit_codes():
        from ..infer.output.merge import merge_parts

        merged = merge_parts(parts, output, output_format)
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
