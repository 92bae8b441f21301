"""Files that are either whole or not there, whatever happens meanwhile, on a disk or in a store."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from .._files import sync_folder
from ..errors import OutputError
from .places import is_remote, open_place, put

TEMPORARY_PREFIX = ".tmp-"

new_digest = functools.partial(hashlib.blake2b, digest_size=16)


class Upload(io.BytesIO):
    """All of a file for a store, which takes it at once.

    Attributes:
        tag: the store's digest or version of it, once it is there.
    """

    tag: str | None = None


@contextlib.contextmanager
def whole_file(
    path: Path, before_replacing: Callable[[], None] = lambda: None, *, writer: str = ""
) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only once all of it is on the disk or in the store.

    Args:
        path: the file to make; one that exists is replaced.
        before_replacing: called before a file in a store is replaced; raises if it must not be.
        writer: who writes, where others may write the same file meanwhile; part of the temporary name.

    Raises:
        OutputError: the disk is full, read-only or lost, or the store does not take the file.
    """
    if is_remote(path):
        upload = Upload()
        yield upload
        _put(path, upload, before_replacing)
        return
    temporary = path.with_name(TEMPORARY_PREFIX + writer + path.name)
    try:
        temporary.unlink(missing_ok=True)
        # "x" never follows a link that was put in the place of the temporary file.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_failed(path, error) from error


def _put(path: Path, upload: Upload, before_replacing: Callable[[], None]) -> None:
    try:
        try:
            upload.tag = put(path, upload.getvalue(), only_new=True)
        except FileExistsError:
            before_replacing()
            upload.tag = put(path, upload.getvalue())
    except OSError as error:
        raise write_failed(path, error) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write all of a file at once; see `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, such that they survive a power loss.

    Raises:
        OSError: one of them cannot be made.
        OutputError: the disk does not keep one that was made.
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
    """Build the error for a file that could not be written."""
    remedy = {
        errno.ENOSPC: "Free some space",
        errno.EDQUOT: "Free some of your quota",
        errno.EFBIG: "Allow larger files (ulimit -f)",
        errno.EROFS: "Make the folder writable",
        errno.EACCES: "Make the folder writable",
    }.get(error.errno or 0, "Check the network and the credentials" if is_remote(path) else "Check the disk")
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}", f"{remedy}, then continue with --resume."
    )


def digest_file(path: Path) -> str:
    """Return a digest of all bytes of a file."""
    with open_place(path) as file:
        return hashlib.file_digest(cast(Any, file), new_digest).hexdigest()
