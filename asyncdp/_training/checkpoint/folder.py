"""The folder of a checkpoint: whole or not there, whatever happens while it is written.

A checkpoint is written into a folder of its own beside the final one, and renamed. Where one stands already,
the new files move in beside the old ones, and the replacing of a single file, torch's `.metadata`, makes them
the checkpoint. A manifest names all files of it with their checksums.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..._files import sync_folder
from ...errors import CheckpointError, DamagedCheckpointError, NotACheckpointError
from .entries import CalledOff, Entries, Kind, Path_, Stop

if TYPE_CHECKING:
    from .dcp import Reader

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves behind stays there
    fcntl = None  # type: ignore[assignment]

_FORMAT = 1
_METADATA = ".metadata"
_PARTIAL = ".partial"
_BLOCK_BYTES = 2**20


def check_target(path: Path) -> None:
    """Refuse a place that no checkpoint can be written to, or that holds something else.

    Raises:
        CheckpointError: it is that of a file, or of a folder with other things in it.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or not (path / _METADATA).exists() or not any(path.glob("*.json")):
        raise CheckpointError(
            f"{path} exists and is no checkpoint of an engine, so that none is written there",
            "Name a new folder, or an earlier checkpoint to replace.",
        )


def write(path: Path, entries: Entries, about: Mapping[str, Any], stop: Stop) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: its folder; an earlier checkpoint there is replaced.
        entries: what it holds, on the CPU.
        about: goes into its manifest; JSON.
        stop: gives it up, until it is whole.

    Raises:
        CheckpointError: the disk is full or lost, or something cannot be pickled.
        CalledOff: it was given up.
    """
    from . import dcp  # on this thread, as it takes most of a second

    prefix = uuid.uuid4().hex
    partial = path.with_name(f".{path.name}.{prefix}{_PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        partial.mkdir()
        with _locked(partial):
            dcp.write(partial, entries, prefix, stop)
            _write_manifest(partial, prefix, about, stop)
            stop.check()
            _move(partial, path)
    except OSError as error:
        cause = f"{path} cannot be written: {error.strerror or error}"
        raise CheckpointError(cause, "Make room there, or name another folder; nothing was left.") from error
    except CalledOff:
        raise
    except Exception as error:
        cause = f"{path} cannot be written: {type(error).__name__}: {error}"
        remedy = "What the optimizer, the scheduler, the module and extra hold has to be picklable."
        raise CheckpointError(cause, remedy) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_manifest(folder: Path, prefix: str, about: Mapping[str, Any], stop: Stop) -> None:
    files = {
        file.name: {"bytes": file.stat().st_size, "crc32": _checksum(file, stop)} for file in folder.iterdir()
    }
    manifest = {"format": _FORMAT, "torch": torch.__version__, **about, "files": files}
    manifest["crc32"] = _checksum_of(manifest)
    with open(folder / f"{prefix}.json", "x") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _move(partial: Path, path: Path) -> None:
    """Give a whole checkpoint its name, in one atomic step."""
    try:
        partial.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        with _locked(path):
            _replace(partial, path)
    sync_folder(path.parent)


def _replace(partial: Path, path: Path) -> None:
    """Make the files of a whole checkpoint those of another one that stands at `path`."""
    check_target(path)
    old = [file for file in path.iterdir() if file.name != _METADATA and _is_ours(file)]
    for file in [*partial.iterdir()]:
        if file.name != _METADATA:
            file.rename(path / file.name)
    sync_folder(path)
    (partial / _METADATA).replace(path / _METADATA)
    sync_folder(path)
    for file in old:
        file.unlink(missing_ok=True)


def _is_ours(file: Path) -> bool:
    """Return whether a file has the name of a part of a checkpoint."""
    prefix = file.name[:32]
    return len(prefix) == 32 and not set(prefix) - set("0123456789abcdef")


def _sweep(path: Path) -> None:
    """Remove what killed processes have left beside a checkpoint."""
    for partial in path.parent.glob(f".{_escaped(path.name)}.*{_PARTIAL}"):
        with contextlib.suppress(OSError), _locked(partial, wait=False) as is_locked:
            # An empty one may have been made just now, and be about to be locked.
            if is_locked and (any(partial.iterdir()) or partial.stat().st_mtime < time.time() - 60):
                shutil.rmtree(partial, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process; give whether there is one.

    Raises:
        OSError: with `wait=False`, another one holds it.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_locked = True
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


class Opened:
    """A checkpoint whose files are known to be whole.

    Attributes:
        path: its folder, without links.
        about: its manifest.
        kinds: the kind of every entry.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], reader: Reader) -> None:
        self.path = path
        self.about = about
        self.kinds: Mapping[Path_, Kind | None] = reader.kinds
        self._reader = reader

    @property
    def identity(self) -> str:
        """Return what no other checkpoint has."""
        return str(self.about["files"][_METADATA]["crc32"])

    def read(self, paths: Collection[Path_], stop: Stop) -> Entries:
        """Read some entries.

        Raises:
            DamagedCheckpointError: that is not possible.
            CalledOff: it was given up.
        """
        with _as_damage(self.path):
            return self._reader.read(paths, stop)


def open_whole(path: Path, stop: Stop) -> Opened:
    """Check every file of a checkpoint, and find out what it holds.

    Raises:
        NotACheckpointError: there is none.
        DamagedCheckpointError: a file is missing, cut off or changed.
        CalledOff: it was given up.
    """
    from . import dcp  # on this thread, as it takes most of a second

    path = path.resolve()
    about = _manifest_of(path, stop)
    for name, facts in about["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != facts["bytes"]:
                raise DamagedCheckpointError(path, f"{name} has {size} bytes instead of {facts['bytes']}")
            if _checksum(file, stop) != facts["crc32"]:
                raise DamagedCheckpointError(path, f"{name} was changed since it was written")
        except FileNotFoundError:
            raise DamagedCheckpointError(path, f"{name} is missing") from None
        except OSError as error:
            raise DamagedCheckpointError(path, f"{name} cannot be read: {error.strerror}") from error
    with _as_damage(path, f" (by torch {torch.__version__}, written by {about['torch']})"):
        return Opened(path, about, dcp.Reader(path))


def _manifest_of(path: Path, stop: Stop) -> Mapping[str, Any]:
    """Return the manifest of what stands at `path`: the one that knows its `.metadata`."""
    if not path.is_dir():
        raise NotACheckpointError(path, "it is a file" if path.exists() else "there is nothing")
    manifests = [about for file in path.glob("*.json") if (about := _read_manifest(file)) is not None]
    if not manifests:
        raise NotACheckpointError(path, "the folder has no manifest of one that is whole")
    newest = max(about["format"] for about in manifests)
    if newest > _FORMAT:
        raise NotACheckpointError(path, "a later version of asyncdp has written it, in another format")
    try:
        checksum = _checksum(path / _METADATA, stop)
    except OSError as error:
        raise DamagedCheckpointError(path, f"{_METADATA} cannot be read: {error.strerror}") from error
    for about in manifests:
        if about["files"].get(_METADATA, {}).get("crc32") == checksum:
            return about
    raise DamagedCheckpointError(path, f"{_METADATA} was changed since it was written")


def _read_manifest(file: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(file.read_bytes())
        is_whole = manifest.pop("crc32") == _checksum_of(manifest)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return manifest if is_whole else None


def _checksum_of(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


@contextlib.contextmanager
def _as_damage(path: Path, hint: str = "") -> Iterator[None]:
    try:
        yield
    except CalledOff:
        raise
    except Exception as error:
        cause = f"it cannot be read{hint}: {type(error).__name__}: {error}"
        raise DamagedCheckpointError(path, cause) from error


def _checksum(file: Path, stop: Stop) -> int:
    total = 0
    with open(file, "rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            stop.check()
            total = zlib.crc32(block, total)
    return total
