"""Files and folders on a disk or in a store: what is the same for both.

A place is a `pathlib.Path` or, for a URL, a `upath.UPath`, which has the methods of one. Stores are reached
by the drivers of fsspec, which the user installs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from ..errors import InputError, JobUsageError, MissingExtraError

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_MAGIC = re.compile(r"[*?\[]")

# What stores call a digest, or a version, of an object's contents.
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "sha256")


class Found(NamedTuple):
    """A file, with what its disk or store says of it.

    Attributes:
        num_bytes: its size, 0 where a server does not say it.
        tag: the store's own digest or version of its contents, None where there is none.
    """

    path: Path
    num_bytes: int
    tag: str | None = None


def place_of(spec: str | os.PathLike[str]) -> Path:
    """Return the place that a path or a URL names.

    Raises:
        JobUsageError: nothing is known to reach such URLs by.
        MissingExtraError: universal-pathlib is not installed.
    """
    if not isinstance(spec, str | Path):
        return cast(Path, spec)  # a place already
    if isinstance(spec, Path) or not (scheme := _URL.match(spec)):
        return Path(spec)
    try:
        import upath
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"Reading or writing {spec}", error.name or "upath", "stores") from error
    if scheme[1].lower() in ("file", "local"):
        return Path(upath.UPath(spec).path)
    try:
        place = upath.UPath(spec, use_listings_cache=False)
        place.fs  # noqa: B018  loads the driver
    except ImportError as error:
        raise JobUsageError(
            f"{spec} needs a driver that is not installed: {error}", "Install the package that it names."
        ) from error
    except ValueError as error:
        raise JobUsageError(
            f"{spec} cannot be reached: {error}", "Name a store that fsspec knows, such as s3:// or gs://."
        ) from error
    return cast(Path, place)


def is_remote(place: Path) -> bool:
    """Return whether a place is in a store, not on a disk."""
    return not isinstance(place, Path)


def lies_in(place: Path, folder: Path) -> bool:
    """Return whether a place is a folder or in it, at any depth."""
    if is_remote(place) or is_remote(folder):
        return f"{place}/".startswith(f"{str(folder).rstrip('/')}/")
    return place.resolve().is_relative_to(folder.resolve())


def outside(folder: Path, files: Iterable[Found]) -> list[Found]:
    """Return those of many files that do not lie in a folder; each folder of theirs is resolved but once."""
    real: dict[Path, Path] = {}

    def real_path(place: Path) -> Path:
        if place.is_symlink():
            return place.resolve()
        if place.parent not in real:
            real[place.parent] = place.parent.resolve()
        return real[place.parent] / place.name

    if is_remote(folder):
        return [file for file in files if not lies_in(file.path, folder)]
    inside = folder.resolve()
    return [file for file in files if is_remote(file.path) or not real_path(file.path).is_relative_to(inside)]


def find(place: Path) -> Found:
    """Return what there is to know of a file.

    Raises:
        OSError: there is no such file, or its store cannot be reached.
    """
    if not is_remote(place):
        return Found(place, place.stat().st_size)
    with plain_errors():
        return _found(place, _driver(place).info(_key(place)))


def find_all(folder: Path) -> list[Found]:
    """Return all files in a folder and those below it, by name.

    Raises:
        OSError: the store cannot be reached.
    """
    if not is_remote(folder):
        return [Found(path, path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()]
    root = _key(folder).rstrip("/")
    with plain_errors():
        try:
            infos = _driver(folder).find(root, detail=True)
        except FileNotFoundError:
            return []
    names = {name.removeprefix(root).lstrip("/"): info for name, info in infos.items()}
    return [_found(folder / name, info) for name, info in sorted(names.items()) if name]


def find_matching(pattern: str) -> list[Path]:
    """Return the files in a store that a pattern such as `s3://bucket/data/*.jsonl` names."""
    scheme = cast(re.Match[str], _URL.match(pattern))[0]
    parts = pattern.removeprefix(scheme).split("/")
    first = next((index for index, part in enumerate(parts) if _MAGIC.search(part)), len(parts))
    if not 0 < first < len(parts):
        return []
    folder = place_of(scheme + "/".join(parts[:first]))
    rest = "/".join(parts[first:])
    with plain_errors():
        return sorted((path for path in folder.glob(rest) if path.is_file()), key=str)


def exists(place: Path) -> bool:
    """Return whether there is a file or folder."""
    with plain_errors():
        return place.exists()


def names_in(folder: Path) -> list[str]:
    """Return the names of what is directly in a folder, none where it is missing."""
    if not is_remote(folder):
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []
    with plain_errors():
        try:
            listed = _driver(folder).ls(_key(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    names = [PurePosixPath(name.rstrip("/")).name for name in listed]
    return [name for name in names if name != folder.name]


def open_place(place: Path, *, in_order: bool = True) -> IO[bytes]:
    """Open a file for reading; what a driver raises is an `OSError`.

    Args:
        place: the file.
        in_order: whether it is read from its begin to its end, so that reading ahead pays.
    """
    if not is_remote(place):
        return open(place, "rb", buffering=io.DEFAULT_BUFFER_SIZE if in_order else 0)
    with plain_errors():
        kind = "readahead" if in_order else "none"
        file = _driver(place).open(_key(place), "rb", cache_type=kind)
    raw = _Remote(file)
    return cast(IO[bytes], io.BufferedReader(raw, 1 << 18) if in_order else raw)


def read_all(places: list[Path]) -> list[bytes]:
    """Return the contents of some files of one store, which are read at the same time."""
    keys = [_key(place) for place in places]
    with plain_errors():
        contents = _driver(places[0]).cat(keys, on_error="raise")
    return [contents[key] for key in keys] if isinstance(contents, dict) else [contents]


@contextlib.contextmanager
def on_disk(place: Path) -> Iterator[Path]:
    """Give the path of a file on a disk; one in a store is copied there for as long as that takes."""
    if not is_remote(place):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="asyncdp-") as folder:
        copy = Path(folder) / place.name
        _download(place, copy)
        yield copy


@functools.cache
def fetched(spec: str) -> str:
    """Return the path of a file or folder on a disk: that of a URL is a copy, until the process ends.

    Raises:
        InputError: there is nothing at a URL, or its store cannot be reached.
    """
    if not _URL.match(spec):
        return spec
    place = place_of(spec.rstrip("/"))
    folder = tempfile.mkdtemp(prefix="asyncdp-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        if place.is_file():
            copy = Path(folder) / place.name
            _download(place, copy)
            return str(copy)
        found = find_all(place)
        root = _key(place).rstrip("/") + "/"
        for file in found:
            copy = Path(folder) / place.name / _key(file.path).removeprefix(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            _download(file.path, copy)
    except OSError as error:
        raise unreachable(spec, error) from error
    if not found:
        raise InputError(f"There is nothing at {spec}", "Name a file or a folder in the store.")
    return str(Path(folder) / place.name)


def put(place: Path, data: bytes, *, only_new: bool = False) -> str | None:
    """Write a file into a store at once; return the store's digest or version of it, if there is one.

    Args:
        place: where it goes.
        data: all of it.
        only_new: whether to fail when there is such a file, by a conditional put where the store has one.

    Raises:
        FileExistsError: there is one.
        OSError: the store does not take it.
    """
    with plain_errors():
        _driver(place).pipe_file(_key(place), data, mode="create" if only_new else "overwrite")
    return find(place).tag


def append_line(place: Path, line: bytes) -> None:
    """Append a line that a crash may lose; in a store the few lines before are put with it."""
    if not is_remote(place):
        with open(place, "ab") as file:
            file.write(line)
        return
    with plain_errors():
        before = _driver(place).cat_file(_key(place)) if exists(place) else b""
    put(place, before + line)


def remove(place: Path) -> None:
    """Remove a file; one that is gone is no error."""
    if not is_remote(place):
        place.unlink(missing_ok=True)
        return
    with plain_errors(), contextlib.suppress(FileNotFoundError):
        _driver(place).rm_file(_key(place))


def unreachable(place: object, error: Exception) -> InputError:
    """Build the error for a store that does not answer before a job starts."""
    return InputError(
        f"{place} cannot be reached: {error}",
        "Check its name, the network, and the credentials that its driver finds in the environment.",
    )


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a driver raises, which may be of any class, into an `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Remote(io.RawIOBase):
    """A file of a driver, as Python's own raw files are."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return whether the server lets parts of a file be read."""
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with at least a byte, or return 0 at the end."""
        with plain_errors():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the file."""
        with plain_errors():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Return the place in the file."""
        return int(self._file.tell())

    def close(self) -> None:
        """Close the driver's file as well."""
        if not self.closed:
            self._file.close()
        super().close()


def _download(place: Path, copy: Path) -> None:
    with plain_errors():
        _driver(place).get_file(_key(place), str(copy))


def _found(path: Path, info: Mapping[str, Any]) -> Found:
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), None)
    return Found(path, int(info.get("size") or 0), tag)


def _driver(place: Path) -> Any:
    return cast(Any, place).fs


def _key(place: Path) -> str:
    return str(cast(Any, place).path)
