"""One data set of Lance out of the shards of a finished job."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..._files import sync_folder, sync_tree
from ...errors import JobError, JobUsageError, MissingExtraError, OutputExistsError
from ..files import write_failed
from ..places import exists, is_remote
from .schema import common_names, conform, unify
from .tables import TABLE_FORMATS, read_schema, read_table

Shards = Sequence[tuple[Sequence[Path], str]]
"""Files, and the records in them for a person to find them."""


def check_lance_output(output: Path) -> None:
    """Fail where no data set can be made.

    Raises:
        MissingExtraError: Lance is not installed.
        OutputExistsError: there is something already.
        JobUsageError: it is in a store.
    """
    if importlib.util.find_spec("lance") is None:
        raise MissingExtraError("--output-format lance", "pylance", "lance")
    if is_remote(output):
        raise JobUsageError(
            f"--output-format lance writes no data set to {output}: it needs a folder that can be renamed",
            "Name a folder on a disk, and copy it to the store.",
        )
    if exists(output):
        raise OutputExistsError(output)


def write_lance(output: Path, shards: Shards) -> None:
    """Write all rows, in order, into a data set that is there as a whole or not at all.

    It is made under another name beside `output`, which a kill leaves and the next try removes.

    Raises:
        JobError: a shard has another format than those of Arrow, or Lance cannot hold a type.
        JobUsageError: another process makes the same data set.
    """
    import filelock

    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        with filelock.FileLock(output.with_name(f".{output.name}.lock"), blocking=False):
            shutil.rmtree(unfinished, ignore_errors=True)
            _write(unfinished, shards)
            sync_tree(unfinished)
            unfinished.rename(output)
            sync_folder(output.parent)
    except filelock.Timeout:
        raise JobUsageError(f"Another process is writing {output}", "Wait for it to end.") from None
    except OSError as error:
        raise write_failed(output, error) from error


def _write(folder: Path, shards: Shards) -> None:
    import lance

    schema = _common_schema(shards)
    num_rows = 0

    def batches() -> Iterator[Any]:
        nonlocal num_rows
        for paths, where in shards:
            for path in paths:
                table = conform(read_table(path), schema, where)
                num_rows += table.num_rows
                yield from table.to_batches()

    try:
        dataset = lance.write_dataset(batches(), folder, schema)
    except JobError:
        raise
    except Exception as error:
        raise JobError(
            f"Lance does not take the outputs: {type(error).__name__}: {error}",
            "Change their types with --postprocess, or keep the shards.",
        ) from error
    assert dataset.count_rows() == num_rows, "Lance has taken all rows"


def _common_schema(shards: Shards) -> Any:
    schema = None
    for paths, where in shards:
        for path in paths:
            if path.suffix[1:] not in TABLE_FORMATS:
                raise JobUsageError(
                    f"A data set of Lance needs types, and {path.name} states none",
                    f"Write the parts as {' or '.join(TABLE_FORMATS)}.",
                )
            schema = unify(schema, common_names(read_schema(path)), where)
    if schema is None:
        raise JobUsageError("The job has no outputs", "A data set of Lance needs a row at least.")
    return schema
