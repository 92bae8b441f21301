"""The house keeps its order: imports go one way, cost little, and names are what they say."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import asyncdp

PACKAGE = Path(asyncdp.__file__).parent

# What a room may import; each room also itself, and what stands before it.
FLOORS = [
    {"errors"},
    {"_devices", "_kernels", "_runtime", "trace_summary"},
    {"_autograd", "_buckets", "_copies", "_tree", "_wholes"},
    {"_scatter", "_gather", "_replicate", "_replica_set", "_structure", "_parallel_apply"},
    {"_route", "_tuner", "_training", "_reducer", "_adaptive", "_serving", "_data_parallel"},
    {"infer", "cli", "testing", "pytest_plugin"},
]


def floor_of(room: str) -> int:
    """Which floor a room is on; private helpers of a room count as the room."""
    for floor, rooms in enumerate(FLOORS):
        if any(room == known or room.startswith(known + "_") for known in rooms):
            return floor
    raise AssertionError(f"{room} has no place in the house: add it to the floors of this test")


def imported_rooms(path: Path) -> set[str]:
    """The rooms a file imports when it is imported itself (what functions import later is left out)."""
    package = ("asyncdp", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(*base, *name.split("."))[1] for name in names if len(base) + 1 > 1}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    """No room imports one that stands above it."""
    own = floor_of(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    above = {room for room in imported_rooms(path) if floor_of(room) > own}
    assert not above


def test_files_stay_short() -> None:
    """No file of the package is longer than 500 lines."""
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) > 500}
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
