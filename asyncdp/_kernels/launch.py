"""Loads machine code and launches it on the calling thread's current stream of a device."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import torch

from .._torch_private import current_raw_stream
from . import build
from .bodies import THREADS

_lock = threading.Lock()
_kernels: dict[tuple[int, str], Any] = {}
# By raw handle. A wrapper holds only the handle, so one of a destroyed stream does no harm.
_streams: dict[int, Any] = {}


def launch(name: str, device_index: int, num_tiles: int, *arguments: int) -> None:
    """Launch one block for each tile of a kernel's table on the current stream of the current device.

    Args:
        name: one of `build.KERNELS`; built and loaded first if it is not yet.
        device_index: the current CUDA device.
        num_tiles: number of blocks, at least 1.
        *arguments: of the kernel, all 64-bit integers.
    """
    kernel = _kernels.get((device_index, name)) or load(name, device_index)
    handle = current_raw_stream(device_index)
    stream = _streams.get(handle) or _wrap(handle)
    _core().launch(stream, _config(num_tiles), kernel, *arguments)


def load(name: str, device_index: int) -> Any:
    """Return a kernel loaded on a device, after building and loading it where needed."""
    with _lock:
        kernel = _kernels.get((device_index, name))
        if kernel is None:
            code = build.cubin(name, torch.cuda.get_device_capability(device_index))
            _core().Device(device_index).set_current()
            kernel = _core().ObjectCode.from_cubin(code).get_kernel(name)
            _kernels[device_index, name] = kernel
        return kernel


def load_all(device: torch.device) -> None:
    """Build and load every kernel for `device`."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        for name in build.KERNELS:
            load(name, index)


@lru_cache(maxsize=1)
def _core() -> Any:
    import cuda.core

    return cuda.core


@lru_cache(maxsize=4096)
def _config(num_tiles: int) -> Any:
    return _core().LaunchConfig(grid=num_tiles, block=THREADS)


def _wrap(handle: int) -> Any:
    stream = _core().Stream.from_handle(handle)
    _streams[handle] = stream
    return stream
