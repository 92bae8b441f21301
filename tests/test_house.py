"""The package keeps its shape: short files and functions, a light import, tests that use what users use."""

from __future__ import annotations

import ast
import graphlib
import re
import statistics
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import asyncdp

PACKAGE = Path(asyncdp.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def function_lengths() -> dict[str, int]:
    """Lines of every function of the package, decorators left out."""
    return {
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, FUNCTION)
    }


def test_files_stay_short() -> None:
    """No file of the package is longer than 450 lines."""
    long = {str(path): count for path in FILES if (count := len(path.read_text().splitlines())) > 450}
    assert not long


def test_no_function_is_long(function_lengths: dict[str, int]) -> None:
    """No function of the package is longer than 55 lines."""
    assert not {name: length for name, length in function_lengths.items() if length > 55}


def test_most_functions_are_short(function_lengths: dict[str, int]) -> None:
    """Half of the functions have at most 6 lines."""
    assert statistics.median(function_lengths.values()) <= 6


def test_no_circles_between_files() -> None:
    """No two files import each other, directly or through others; `lint-imports` holds the layers."""
    graph = grimp.build_graph("asyncdp", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    in_order = [
        *graphlib.TopologicalSorter(imports).static_order()
    ]  # raises CycleError, which names the circle
    assert set(in_order) >= set(imports)


def test_few_tests_look_inside() -> None:
    """Most promises are tested from outside: few test modules name private modules of the package."""
    inside = re.compile(r"asyncdp\._[a-z]|from asyncdp import _[a-z]")
    here = Path(__file__)
    private = [path for path in TESTS.rglob("*.py") if path != here and inside.search(path.read_text())]
    assert len(private) <= 31


def test_import_is_light() -> None:
    """Importing asyncdp imports none of the packages that only kernels, the command line or traces need."""
    heavy = {
        "cuda.core",
        "filelock",
        "matplotlib",
        "numba",
        "numba_cuda",
        "opentelemetry",
        "PIL",
        "prometheus_client",
        "pyarrow",
        "rich",
        "safetensors",
        "transformers",
        "trio",
        "typer",
    }
    code = f"import asyncdp, sys; asyncdp.DataParallel; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_of_the_package_alone_leaves_torch_out() -> None:
    """Naming nothing of the package does not import torch: pytest loads its plugin in every run."""
    code = "import asyncdp.pytest_plugin, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_exports_are_sorted_and_real() -> None:
    """Every public name exists, and the list is in order."""
    assert list(asyncdp.__all__) == sorted(asyncdp.__all__)
    assert all(hasattr(asyncdp, name) for name in asyncdp.__all__)
