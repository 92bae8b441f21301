"""Run a script on the asyncdp of any commit, each time in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

THIS = Path(__file__).resolve().parent.parent
"""The tree that this script belongs to."""


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Check a commit out into a temporary git worktree."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        git = ("git", "-C", str(THIS), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def run_on(tree: Path, script: str, *arguments: str) -> Any:
    """Run a script of this tree with the asyncdp of `tree`; return what `answer` was given there."""
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        check=True,
    )
    message = json.loads(done.stdout.splitlines()[-1])
    if Path(message["tree"]) != tree:
        raise SystemExit(f"asyncdp was imported from {message['tree']}, not from {tree}")
    return message["value"]


def answer(value: Any) -> None:
    """Print a value for the `run_on` that started this process, with the tree asyncdp comes from."""
    import asyncdp

    tree = Path(asyncdp.__file__).resolve().parent.parent
    print(json.dumps({"tree": str(tree), "value": value}))
