"""Files that are either whole or not there, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import torch
from torch import nn

from ...errors import OutputError

TEMPORARY_PREFIX = ".tmp-"

WHOLE_BELOW = 256 << 20
"""Bytes from which on a file is compared by samples, and by its time where that stays the same."""

_CHUNK = 1 << 20


def write_whole(path: Path, fill: Callable[[IO[bytes]], None]) -> None:
    """Writes a file that appears under its name only once all of it is on the disk.

    Args:
        path: The file to make; one that exists is replaced.
        fill: Writes the contents.

    Raises:
        OutputError: When the disk is full, read-only or gone.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    try:
        temporary.unlink(missing_ok=True)
        # "x" never follows a link that somebody put in the place of the temporary file.
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_failed(path, error) from error


def write_whole_bytes(path: Path, data: bytes) -> None:
    """Does what `write_whole` does, with contents that are at hand."""

    def fill(file: IO[bytes]) -> None:
        file.write(data)

    write_whole(path, fill)


def sync_folder(path: Path) -> None:
    """Makes new names in a folder survive a power loss."""
    if os.name == "nt":  # folders cannot be opened there, and renames are durable
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, such that they survive a power loss.

    Raises:
        OSError: When one of them cannot be made.
        OutputError: When the disk does not keep one that was made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        try:
            # A folder may take new names without letting itself be opened.
            with contextlib.suppress(PermissionError):
                sync_folder(folder.parent)
        except OSError as error:
            raise write_failed(folder, error) from error


def write_failed(path: Path, error: OSError) -> OutputError:
    """Builds the error for a file that could not be written."""
    remedy = {
        errno.ENOSPC: "Free some space",
        errno.EDQUOT: "Free some of your quota",
        errno.EFBIG: "Allow larger files (ulimit -f)",
        errno.EROFS: "Make the folder writable",
        errno.EACCES: "Make the folder writable",
    }.get(error.errno or 0, "Check the disk")
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}", f"{remedy}, then continue with --resume."
    )


def digest_file(path: Path) -> str:
    """Returns a digest of all bytes of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_weights(module: nn.Module) -> str:
    """Returns a digest of all parameters and buffers, names included."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        # What has no plain bytes (sparse, quantized, not yet initialized) counts by name and type only.
        with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError):
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_large_file(path: Path, *, num_samples: int = 64) -> str:
    """Returns a digest of a file: of all bytes, or of size and samples where that would take too long."""
    size = path.stat().st_size
    if size < WHOLE_BELOW:
        return digest_file(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        for index in range(num_samples):
            file.seek(max(size - _CHUNK, 0) * index // (num_samples - 1))
            digest.update(file.read(_CHUNK))
    return digest.hexdigest()


def times_of_large_files(paths: Iterable[Path]) -> list[tuple[str, int]]:
    """Returns name and time of change (ns) of each file whose digest covers samples only."""
    found = [(path.name, path.stat()) for path in paths]
    return [(name, status.st_mtime_ns) for name, status in found if status.st_size >= WHOLE_BELOW]
