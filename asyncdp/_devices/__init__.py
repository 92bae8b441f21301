"""One small interface to a device, and its drivers."""

from __future__ import annotations

import torch

from .base import LaneDevice
from .spec import DeviceLike, Devices, parse_devices

__all__ = ["DeviceLike", "Devices", "LaneDevice", "lane_device_for", "parse_devices"]


def lane_device_for(device: torch.device) -> LaneDevice:
    """Make the driver of one lane on `device`.

    Accelerators other than CUDA need none of their own: an operation issued on torch's default
    stream is ordered behind all earlier ones, so the caller's later operations see its result.
    """
    if device.type == "cuda":
        from .cuda import CudaLane

        return CudaLane(device)
    return LaneDevice(device)
