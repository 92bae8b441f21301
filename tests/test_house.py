"""The house keeps its order: imports go one way, cost little, and names are what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import asyncdp

PACKAGE = Path(asyncdp.__file__).parent

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def test_files_stay_short() -> None:
    """No file of the package is longer than 450 lines."""
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) > 450}
    assert not long


def test_import_is_light() -> None:
    """Importing asyncdp imports none of the packages that only kernels, the command line or traces need."""
    heavy = (
        "numba",
        "numba_cuda",
        "cuda.core",
        "typer",
        "rich",
        "pyarrow",
        "safetensors",
        "trio",
        "transformers",
    )
    code = f"import asyncdp, sys; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exports_are_sorted_and_real() -> None:
    """Every public name exists, and the list is in order."""
    assert list(asyncdp.__all__) == sorted(asyncdp.__all__)
    assert all(hasattr(asyncdp, name) for name in asyncdp.__all__)
