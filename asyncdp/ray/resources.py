"""The devices that Ray has given to a worker process."""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray
import torch

from .._devices import parse_devices
from .._devices.spec import MAX_DEFAULT_CPU_LANES


def devices_of_worker() -> list[torch.device]:
    """Return one device per lane for the task or actor that this process runs.

    Every GPU that Ray has given to it, else as many CPU lanes as it has CPUs, at most 8. What
    `ASYNCDP_DEVICES` names counts before that; a process that is no worker of Ray's gets the default.

    Raises:
        NoCudaDeviceError, UnknownDeviceError: torch sees no such device.
    """
    context = ray.get_runtime_context() if ray.is_initialized() else None
    if os.environ.get("ASYNCDP_DEVICES") or context is None or context.worker.mode != ray.WORKER_MODE:
        return parse_devices(None)
    gpus = context.get_accelerator_ids().get("GPU", [])
    num_cpus = context.get_assigned_resources().get("CPU", 0.0)
    return parse_devices(lanes_of(gpus, num_cpus, os.environ.get("CUDA_VISIBLE_DEVICES")))


def lanes_of(gpus: Sequence[str], num_cpus: float, visible: str | None) -> list[str]:
    """Return the names of the devices that resources of Ray stand for.

    Args:
        gpus: ids of the GPUs, as Ray counts or names them; a share of a GPU is one of them.
        num_cpus: number of CPUs; an actor that asks for none has 0, and gets one lane.
        visible: the environment variable `CUDA_VISIBLE_DEVICES`, which Ray sets, unless told not to; torch
            counts the devices in it from 0.
    """
    if not gpus:
        return ["cpu"] * max(1, min(int(num_cpus), MAX_DEFAULT_CPU_LANES))
    seen = [name.strip() for name in visible.split(",")] if visible else []
    return [f"cuda:{seen.index(gpu) if gpu in seen else gpu}" for gpu in gpus]
