"""What a lane needs to know of its device, and which devices a specification means."""

from __future__ import annotations

import torch

from .._kernels import PathStatistics, path_statistics
from .base import LaneDevice
from .spec import DeviceLike, Devices, parse_devices

__all__ = [
    "DeviceLike",
    "Devices",
    "LaneDevice",
    "PathStatistics",
    "lane_device_for",
    "parse_devices",
    "path_statistics",
]


def lane_device_for(device: torch.device) -> LaneDevice:
    """Make the `LaneDevice` of one lane on `device`.

    Accelerators other than CUDA need no class of their own: an operation issued on torch's default
    stream is ordered behind all earlier ones, so the caller's later operations see its result.
    """
    if device.type == "cuda":
        from .cuda import CudaLane

        return CudaLane(device)
    return LaneDevice(device)
