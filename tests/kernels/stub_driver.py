"""Builds the driver that does nothing, and runs Python under it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Puts asyncdp's launch where a GPU would have put it: a kernel loaded on device 0, and a stream's handle.
PREPARE = """
import torch
torch._C._cuda_getCurrentRawStream = lambda index: 0x2000
torch.cuda.get_device_capability = lambda device: (9, 0)
from asyncdp._kernels import launch
"""


def compiler() -> str | None:
    """Return the C compiler there is, if any."""
    return shutil.which("cc") or shutil.which("gcc")


def run_under_stub(code: str, directory: Path, *, trace: bool = False) -> str:
    """Return what Python code prints when its CUDA driver is the stub, built into `directory`."""
    library = directory / "libcuda.so.1"
    source = Path(__file__).with_suffix(".c")
    command = [compiler() or "cc", "-shared", "-fPIC", "-O2", "-w", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    shutil.copy(library, directory / "libcuda.so")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(directory)}
    if trace:
        environment["STUB_TRACE"] = "1"
    command = [sys.executable, "-W", "ignore", "-c", PREPARE + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
