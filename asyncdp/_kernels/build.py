"""Builds machine code from the kernels' source, with or without a GPU or driver, and caches it on disk.

The cache holds one file for each kernel, architecture and version of source and toolkit. A file is written
under another name and then renamed, so any number of processes may build the same kernel at once: each builds
it, and the last one's file, equal to the others', stays.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

from .chain import DISTRIBUTIONS

SUMMED_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
KERNELS = (*(f"reduce_add_{dtype}" for dtype in SUMMED_DTYPES), "copy")
_DIGEST_BYTES = hashlib.sha256().digest_size


def cubin(kernel: str, capability: tuple[int, int]) -> bytes:
    """Return the machine code of one of `KERNELS`, from the cache or newly built (about half a second).

    Args:
        kernel: its name, also the name of the entry in the code.
        capability: compute capability, such as (9, 0).
    """
    path = cache_directory() / f"{kernel}-sm_{capability[0]}{capability[1]}-{_fingerprint()}.cubin"
    code = _read(path)
    if code is None:
        code = _build(kernel, capability)
        _write(path, code)
    return code


def cache_directory() -> Path:
    """Return the folder of the cache: `ASYNCDP_CACHE_DIR`, else `asyncdp` in the user's cache."""
    given = os.environ.get("ASYNCDP_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asyncdp"


@cache
def _fingerprint() -> str:
    """Return a hash of everything the machine code depends on, except kernel and architecture."""
    digest = hashlib.sha256()
    for name in ("bodies.py", "source.py", "build.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    for name in ("numba", *DISTRIBUTIONS):
        digest.update(f"{name} {metadata.version(name)}\n".encode())
    return digest.hexdigest()[:24]


def _build(kernel: str, capability: tuple[int, int]) -> bytes:
    from cuda.core import Linker, LinkerOptions, ObjectCode

    from . import source

    text = source.ptx(kernel, capability)
    options = LinkerOptions(arch=f"sm_{capability[0]}{capability[1]}")
    return bytes(Linker(ObjectCode.from_ptx(text.encode()), options=options).link("cubin").code)


def _read(path: Path) -> bytes | None:
    """Return the code in a cache file, or None where there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    # Without a cache the code still runs; the next process builds it again.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        return
