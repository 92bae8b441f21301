"""How tensors of other devices reach a kernel: read in place by peers, or staged by a copy first."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PathStatistics:
    """Which way input tensors of other devices took to a kernel, counted since the process started.

    Attributes:
        num_peer: were read from another device's memory in place.
        num_staged: were copied to the kernel's device first.
    """

    num_peer: int = 0
    num_staged: int = 0


class _Counter:
    """Counts from several lane threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = PathStatistics()

    def add(self, *, num_peer: int, num_staged: int) -> None:
        with self._lock:
            counts = self._counts
            self._counts = PathStatistics(counts.num_peer + num_peer, counts.num_staged + num_staged)

    def read(self) -> PathStatistics:
        return self._counts


_counter = _Counter()
_peers: dict[tuple[int, int], bool] = {}


def statistics() -> PathStatistics:
    """Return the ways taken so far by compiled kernels of this process; all zero where torch's run."""
    return _counter.read()


def wait_for_sources(tensors: Iterable[Tensor], destination: torch.device) -> bool:
    """Order the current stream of `destination` after that of every other CUDA device a tensor lies on.

    Returns:
        Whether any tensor lies elsewhere, and `bring` is due.
    """
    devices = {tensor.device for tensor in tensors} - {destination}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(destination).wait_stream(torch.cuda.current_stream(device))
    return bool(devices)


def bring(tensors: Sequence[Tensor], destination: torch.device) -> Sequence[Tensor]:
    """Return tensors a kernel on `destination` can read: those given, or copies of what it cannot reach.

    What is read in place stays allocated until the current stream of `destination` has read it; a copy is
    ordered by torch between the current streams of both devices.
    """
    foreign = [i for i, tensor in enumerate(tensors) if tensor.device != destination]
    brought = list(tensors)
    num_staged = 0
    for i in foreign:
        if _readable(tensors[i].device, destination):
            tensors[i].record_stream(torch.cuda.current_stream(destination))
        else:
            brought[i] = tensors[i].to(destination, non_blocking=True)
            num_staged += 1
    _counter.add(num_peer=len(foreign) - num_staged, num_staged=num_staged)
    return brought


def enable_peers(device_index: int) -> None:
    """Find the devices whose memory kernels on this one can read, and open the way to them."""
    for other in range(torch.cuda.device_count()):
        if other != device_index:
            _readable(torch.device("cuda", other), torch.device("cuda", device_index))


def _readable(source: torch.device, destination: torch.device) -> bool:
    """Tell whether kernels on `destination` may read the memory of `source` in place."""
    if source.type != "cuda" or destination.type != "cuda":
        return False
    pair = (source.index, destination.index)
    if pair not in _peers:
        both_ways = torch.cuda.can_device_access_peer(source, destination)
        both_ways = both_ways and torch.cuda.can_device_access_peer(destination, source)
        if both_ways:
            # Torch opens the way at the first copy between two devices, in both allocators' memory.
            torch.zeros(1, device=source).to(destination)
            torch.zeros(1, device=destination).to(source)
        _peers[pair] = both_ways
    return _peers[pair]
