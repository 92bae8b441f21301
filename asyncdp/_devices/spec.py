"""Parses specifications of devices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from ..errors import AsyncDPError, NoCudaDeviceError, NoDevicesError, UnknownDeviceError

DeviceLike = str | int | torch.device
Devices = None | DeviceLike | Sequence[DeviceLike]

# More CPU lanes rarely help: each holds a batch's activations, and torch's intra-op threads use the
# remaining cores.
MAX_DEFAULT_CPU_LANES = 8


def parse_devices(devices: Devices = None) -> list[torch.device]:
    """Turn a specification into one device per lane.

    Args:
        devices: `None` for the default (the environment variable `ASYNCDP_DEVICES` if it is set;
            else every CUDA device; else one CPU lane per core, at most 8), `"cuda"` for every CUDA
            device, `"cpu"`, `"cpu*4"` for four lanes, `"cuda:0,cuda:1"`, or a sequence of names,
            CUDA indices and `torch.device`. A device may be repeated: each entry is a lane.

    Returns:
        the devices in order, CUDA devices always with their index.

    Raises:
        NoCudaDeviceError: CUDA is asked for and torch sees no CUDA device.
        UnknownDeviceError: a name is malformed, or this machine has no such device.
        NoDevicesError: the sequence is empty.
    """
    if devices is None:
        return _default_devices()
    if isinstance(devices, str):
        parsed = [device for part in devices.split(",") for device in _parse_name(part.strip())]
    elif isinstance(devices, Iterable):
        parsed = [device for entry in devices for device in _parse_entry(entry)]
    else:
        parsed = _parse_entry(devices)
    if not parsed:
        raise NoDevicesError
    return parsed


def _default_devices() -> list[torch.device]:
    named = os.environ.get("ASYNCDP_DEVICES")
    if named:
        try:
            return parse_devices(named)
        except AsyncDPError as error:
            error.args = (f"{error} The name is from the environment: ASYNCDP_DEVICES={named!r}.",)
            raise
    if torch.cuda.is_available():
        return _all_cuda_devices()
    return [torch.device("cpu")] * min(torch.get_num_threads(), MAX_DEFAULT_CPU_LANES)


def _all_cuda_devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise NoCudaDeviceError
    return [torch.device("cuda", index) for index in range(count)]


def _parse_entry(entry: DeviceLike) -> list[torch.device]:
    if isinstance(entry, bool) or not isinstance(entry, (str, int, torch.device)):
        raise UnknownDeviceError(entry, f"a {type(entry).__qualname__} names no device")
    if isinstance(entry, str):
        return _parse_name(entry.strip())
    if isinstance(entry, int):
        if entry < 0:
            raise UnknownDeviceError(entry, "an index is not negative")
        return [_existing(torch.device("cuda", entry), entry)]
    return [_existing(entry, entry)]


def _parse_name(name: str) -> list[torch.device]:
    if name == "cuda":
        return _all_cuda_devices()
    base, star, times = name.partition("*")
    if star and not (times.strip().isdecimal() and int(times) > 0):
        raise UnknownDeviceError(name, "the number after * must be a positive integer")
    try:
        device = torch.device(base.strip())
    except RuntimeError as error:
        raise UnknownDeviceError(name, "torch knows no device of this name") from error
    return [_existing(device, name)] * (int(times) if star else 1)


def _existing(device: torch.device, spec: object) -> torch.device:
    """Return `device` with its index, if this machine has it.

    Raises:
        UnknownDeviceError: it has not, or torch does not see it.
    """
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        count = len(_all_cuda_devices())
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= count:
            raise UnknownDeviceError(spec, f"torch sees {count} CUDA devices, numbered from 0")
        return torch.device("cuda", index)
    module = getattr(torch, device.type, None)
    if module is None or not getattr(module, "is_available", lambda: False)():
        raise UnknownDeviceError(spec, f"torch sees no {device.type} device on this machine")
    return device
