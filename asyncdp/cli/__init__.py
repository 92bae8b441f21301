"""The command line: parse, run, report."""

from __future__ import annotations

import importlib.util
import sys

_PACKAGES = ("typer", "rich", "pyarrow", "safetensors", "filelock")


def main() -> None:
    """Runs the command line; says what to install when its packages are missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"The command line needs {', '.join(missing)}. Install it: pip install 'asyncdp[cli]'")
    from asyncdp.cli.app import app

    app(prog_name="asyncdp")
