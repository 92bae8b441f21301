"""What all benches share: where results come from, where they go, and load beside a measurement."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def origin() -> dict[str, str]:
    """Return what every result names."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": describe(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float:
    """Return the load of the last minute."""
    return os.getloadavg()[0]


def describe() -> str:
    """Name the processor, and how many of its cores are in use."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores, in_all = num_cores(), os.cpu_count()
    share = f"{cores} cores" if cores == in_all else f"{cores} of {in_all} cores"
    return f"{models[0] if models else platform.machine()}, {share}"


def commit() -> str:
    """Return the short name of the commit that is checked out, or `unknown`."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return ran.stdout.strip() or "unknown"


@contextmanager
def busy_processes(count: int, *, idle_priority: bool = False) -> Iterator[None]:
    """Keep `count` processes computing; those of idle priority give way to all others."""
    yielding = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
    code = (yielding if idle_priority else "") + "while True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def cores_awake() -> Iterator[None]:
    """Keep every core from sleeping, without taking time from anybody."""
    with busy_processes(num_cores(), idle_priority=True):
        yield


def save(name: str, result: Mapping[str, Any], page: str, folder: Path = RESULTS) -> None:
    """Write a result as JSON and as a page of Markdown, and print the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(page)
    print(page)
