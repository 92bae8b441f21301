"""How the output folders of one job that was split with `--shard i/n` are joined."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import JobUsageError, ResumeRefusedError
from ..files import whole_file
from ..places import Found, find, open_place, place_of
from .journal import SAMPLED_TIMES, TIMES, Block, JournalState, StoredFile, load_journal
from .lance_dataset import check_lance_output, write_lance
from .output import OutputFolder, check_output_free, explain_changes
from .shards import check_joins


class Merged(NamedTuple):
    """What was joined."""

    num_records: int
    num_bad: int


def merge_parts(
    folders: Sequence[str | Path], output: str | Path, output_format: str | None = None
) -> Merged:
    """Copy the shards of all parts into one folder, which then is as if one run had made it.

    Shards carry the number of their block, so their names in the whole are the ones they have.

    Args:
        folders: output folders of the parts, by path or URL, in any order.
        output: folder for the whole; must be empty or missing, or hold an earlier try at the same.
        output_format: None for that of the parts; "lance" makes one data set of Lance.

    Raises:
        JobUsageError: a part is missing, named twice, unfinished, damaged or of another job.
        JobError: the parts' outputs are of different types or shapes.
    """
    output = place_of(output)
    if output_format not in (None, "lance"):
        raise JobUsageError(f"--output-format {output_format} is unknown to merge", "Give lance or nothing.")
    if output_format == "lance":
        check_lance_output(output)
    else:
        check_output_free(output, resume=True)
    parts = {folder: load_journal(folder) for folder in map(place_of, folders)}
    fingerprint, total = _same_job(parts), _same_length(parts)
    blocks = _all_blocks(parts, total, fingerprint["shard_size"])
    whole = JournalState(fingerprint, {block.index: block for _, block in blocks})
    for index, block in whole.blocks.items():
        check_joins(fingerprint["output_format"], whole.schema, block.schema, whole.place_of(index))
    merged = Merged(sum(block.num_records for _, block in blocks), sum(block.num_bad for _, block in blocks))
    if output_format == "lance":
        write_lance(
            output, [(_intact_shards(folder, block), whole.place_of(block.index)) for folder, block in blocks]
        )
        return merged
    with OutputFolder(output, fingerprint["output_format"], fingerprint, resume=True) as target:
        for folder, block in blocks:
            if block.index not in target.finished:
                _copy(folder, block, target)
        target.widen_shards()
        target.finish(total)
    return merged


def _same_job(parts: dict[Path, JournalState]) -> dict[str, Any]:
    """Return the fingerprint of the unsplit job."""
    same = {"shard": [0, 1], TIMES: None, SAMPLED_TIMES: None}
    wholes = {folder: {**state.fingerprint, **same} for folder, state in parts.items()}
    first = next(iter(wholes.values()))
    for folder, whole in wholes.items():
        if changes := explain_changes(first, whole):
            raise ResumeRefusedError(
                f"{folder} belongs to a different job: {'; '.join(changes)}", "Merge parts of one job."
            )
    shards = [tuple(state.fingerprint["shard"]) for state in parts.values()]
    num_parts = shards[0][1]
    missing = {(index, num_parts) for index in range(num_parts)} - set(shards)
    if missing or len(shards) != num_parts:
        names = ", ".join(f"{index + 1}/{num}" for index, num in sorted(missing)) or "none"
        raise JobUsageError(
            f"{len(shards)} folders for a job of {num_parts} parts; missing: {names}",
            "Name the folder of every part once.",
        )
    # The times are those of the first part, whatever order the folders are named in.
    earliest = min(parts.values(), key=lambda state: state.fingerprint["shard"])
    return {**earliest.fingerprint, "shard": [0, 1], SAMPLED_TIMES: None}


def _same_length(parts: dict[Path, JournalState]) -> int:
    lengths = {folder: state.num_records for folder, state in parts.items()}
    for folder, length in lengths.items():
        if length is None:
            raise JobUsageError(f"{folder} is not finished", "Continue its job with --resume first.")
    if len(set(lengths.values())) != 1:
        raise JobUsageError(f"The parts saw inputs of different length: {lengths}", "Run them again.")
    return next(length for length in lengths.values() if length is not None)


def _all_blocks(parts: dict[Path, JournalState], total: int, block_size: int) -> list[tuple[Path, Block]]:
    found = {
        block.index: (folder, block) for folder, state in parts.items() for block in state.blocks.values()
    }
    for index in range(-(-total // block_size)):
        if index not in found:
            raise JobUsageError(
                f"Records from {index * block_size} on are in no part", "Run the parts again with --resume."
            )
    return [found[index] for index in sorted(found)]


def _intact_shards(folder: Path, block: Block) -> list[Path]:
    """Return the shards of a block with outputs; fail where one is not what the journal says."""
    shards = [stored for stored in block.files if stored.name.startswith("part-")]
    return [_intact(folder, stored) for stored in shards]


def _intact(folder: Path, stored: StoredFile) -> Path:
    path = folder / stored.name
    if not stored.is_intact(_found(path)):
        raise JobUsageError(f"{path} is missing or damaged", "Run that part again with --resume.")
    return path


def _copy(folder: Path, block: Block, target: OutputFolder) -> None:
    files = []
    for stored in block.files:
        path = _intact(folder, stored)
        with open_place(path) as source, whole_file(target.path / stored.name) as copy:
            shutil.copyfileobj(source, copy)
        files.append(StoredFile.of(target.path / stored.name, copy))
    target.journal.finish_block(dataclasses.replace(block, files=tuple(files)))


def _found(path: Path) -> Found | None:
    try:
        return find(path)
    except OSError:
        return None
