"""What this machine offers, for `asyncdp devices`."""

from __future__ import annotations

import torch

from .._devices import parse_devices
from .._kernels import report
from ..errors import JobUsageError


def describe_devices(spec: str | None) -> str:
    """Return a few lines on every lane, peer access, and kernels with the reason where there are none.

    Raises:
        JobUsageError: the machine has no such device.
    """
    try:
        lanes = parse_devices(spec)
    except (ValueError, RuntimeError) as error:
        raise JobUsageError(str(error).rstrip("."), "Run `asyncdp devices` without an argument.") from error
    unique = list(dict.fromkeys(lanes))
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"]
    for device in unique:
        lines += _about(device, lanes.count(device))
    return "\n".join(lines + _peers([device for device in unique if device.type == "cuda"]))


def _about(device: torch.device, num_lanes: int) -> list[str]:
    kernels = report(device)
    lines = [
        f"{device}: {num_lanes} {'lane' if num_lanes == 1 else 'lanes'}, {_memory(device)}",
        f"  kernels: {kernels.implementation} ({kernels.reason})",
        *(f"  missing: {cause}" for cause in kernels.missing),
    ]
    return lines + ([f"  remedy: {kernels.remedy}"] if kernels.remedy else [])


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    try:
        free, total = _host_memory()
    except (OSError, ValueError, KeyError):
        return "memory unknown"
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _host_memory() -> tuple[int, int]:
    with open("/proc/meminfo") as file:
        entries = dict(line.split(":", 1) for line in file)
    free, total = (int(entries[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return free, total


def _peers(devices: list[torch.device]) -> list[str]:
    if len(devices) < 2:
        return ["peer access: needs two CUDA devices"]
    pairs = [(a, b) for a in devices for b in devices if a != b]
    reached = [f"{a}->{b}" for a, b in pairs if torch.cuda.can_device_access_peer(a, b)]
    return [f"peer access: {', '.join(reached) or 'none; copies go through host memory'}"]
