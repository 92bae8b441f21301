"""Where results come from: the machine, the software, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch


def origin() -> dict[str, str]:
    """What every result names."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": describe(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> str:
    """Name the processor, and how many of its cores are in use."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores, in_all = num_cores(), os.cpu_count()
    share = f"{cores} cores" if cores == in_all else f"{cores} of {in_all} cores"
    return f"{models[0] if models else platform.machine()}, {share}"


def commit() -> str:
    """The short name of the commit that is checked out, or `unknown`."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return ran.stdout.strip() or "unknown"
