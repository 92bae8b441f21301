"""Which kernels a device runs, and what is missing for the compiled ones.

Nothing here imports Numba or cuda.core: installed distributions are found by their metadata.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Literal

import torch

from ..errors import KernelsUnavailableError

Implementation = Literal["numba", "torch"]

INSTALL_COMMAND = 'pip install "asyncdp[cuda]"'
# The kernels' conversions of half types need 8.0; 12.1 is the newest that toolkit 13.0 compiles for.
MINIMUM_CAPABILITY, MAXIMUM_CAPABILITY = (8, 0), (12, 1)
# A driver refuses code of a newer toolkit than its own, and the wheels are of 13.0.
MINIMUM_DRIVER = (13, 0)
DISTRIBUTIONS = {
    "numba-cuda": "0.30.4",
    "cuda-core": "",
    "nvidia-cuda-nvrtc": "13.0.",
    "nvidia-nvvm": "13.0.",
    "nvidia-nvjitlink": "13.0.",
}


@dataclass(frozen=True)
class KernelReport:
    """Which kernels run on a device.

    Attributes:
        device: the device reported on.
        implementation: `"numba"` for compiled kernels, `"torch"` for plain torch.
        reason: one sentence saying why.
        missing: parts of the compiled kernels that are missing; empty when none is.
        remedy: the command or step that supplies what is missing; empty when nothing is.
    """

    device: torch.device
    implementation: Implementation
    reason: str
    missing: tuple[str, ...] = ()
    remedy: str = ""


def report(device: torch.device | str) -> KernelReport:
    """Return which kernels `device` runs and why; compiles and loads nothing.

    Raises:
        ValueError: `ASYNCDP_KERNELS` is neither `numba` nor `torch`.
    """
    return _report(torch.device(device), forced())


def implementation(device: torch.device) -> Implementation:
    """Return the implementation that `report` names, at the cost of one dictionary look-up.

    Raises:
        KernelsUnavailableError: `ASYNCDP_KERNELS=numba` on a CUDA device whose chain is incomplete.
    """
    if device.type != "cuda":
        return "torch"
    choice = forced()
    found = _report(device, choice)
    if choice == "numba" and found.missing:
        raise KernelsUnavailableError(device, found.missing, found.remedy)
    return found.implementation


def missing_distributions() -> tuple[str, ...]:
    """Return a text for every distribution of the compiler's chain that is absent or of another version."""
    return tuple(text for name, prefix in DISTRIBUTIONS.items() if (text := _missing(name, prefix)))


def forced() -> str:
    """Return the value of `ASYNCDP_KERNELS`: `"numba"`, `"torch"`, or nothing."""
    choice = os.environ.get("ASYNCDP_KERNELS", "")
    if choice not in ("", "numba", "torch"):
        raise ValueError(
            f"ASYNCDP_KERNELS is {choice!r}. Set it to numba or torch, or unset it for the best available."
        )
    return choice


def with_index(device: torch.device) -> torch.device:
    """Return a CUDA device with its index; a device without one means this thread's current device."""
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


@cache
def _report(device: torch.device, choice: str) -> KernelReport:
    if device.type != "cuda":
        return KernelReport(device, "torch", f"{device.type} devices run the plain torch kernels")
    if choice == "torch":
        return KernelReport(device, "torch", "ASYNCDP_KERNELS=torch asks for the plain torch kernels")
    packages, machine = missing_distributions(), _missing_on(device)
    if not packages and not machine:
        return KernelReport(device, "numba", "every part of the compiled kernels is in place")
    remedy = "; ".join(
        [f"run: {INSTALL_COMMAND}"] * bool(packages) + [step for _, step in machine],
    )
    missing = packages + tuple(cause for cause, _ in machine)
    reason = "the compiled kernels are incomplete"
    if choice == "numba":
        reason = "ASYNCDP_KERNELS=numba forbids the plain torch kernels, so every call will fail"
    return KernelReport(device, "torch", reason, missing, remedy)


def _missing(name: str, prefix: str) -> str:
    wanted = f"{prefix}*" if prefix.endswith(".") else prefix
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} {wanted}".rstrip() + " is not installed"
    return "" if version.startswith(prefix) else f"{name} is {version}, but {wanted} is needed"


def _missing_on(device: torch.device) -> list[tuple[str, str]]:
    # A ROCm build calls its devices cuda too.
    if torch.version.cuda is None or not torch.cuda.is_available():
        return [("torch sees no CUDA device", "check nvidia-smi and that torch is a CUDA build")]
    found = []
    capability, driver = torch.cuda.get_device_capability(device), _driver_version()
    has = "compute capability {}.{}".format(*capability)
    if capability < MINIMUM_CAPABILITY:
        found.append((f"{has} is below 8.0", "use a newer device"))
    if capability > MAXIMUM_CAPABILITY:
        found.append((f"{has} is newer than toolkit 13.0 knows", "use a newer release of asyncdp"))
    if driver < MINIMUM_DRIVER:
        cause = f"the driver supports CUDA {driver[0]}.{driver[1]}, but the kernels are built for 13.0"
        found.append((cause, "update the NVIDIA driver to 580 or newer"))
    return found


def _driver_version() -> tuple[int, int]:
    # From the driver itself: torch does not report it, and a package that does may be missing.
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    number = ctypes.c_int()
    status = library.cuDriverGetVersion(ctypes.byref(number))
    if status != 0:
        raise RuntimeError(f"cuDriverGetVersion failed with CUDA error {status}; check nvidia-smi.")
    # Version 13.2 is the number 13020.
    return number.value // 1000, number.value % 1000 // 10
