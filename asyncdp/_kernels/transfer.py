"""How tensors of other devices reach a kernel: read in place from a peer, or staged by a copy first.

Which devices can read each other's memory is determined when their lanes open, on the lanes' threads, and
only between devices that have lanes: the query alone creates a context on a device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PathStatistics:
    """How input tensors of other devices reached a kernel, counted since the process started.

    Attributes:
        num_peer: tensors read in place from another device's memory.
        num_staged: tensors copied to the kernel's device first.
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
_lock = threading.Lock()
_lane_streams: dict[int, torch.cuda.Stream] = {}  # of one lane on each device; torch never destroys streams
_peers: dict[frozenset[int], bool] = {}


def path_statistics() -> PathStatistics:
    """Return the counts of this process so far; all zero where plain torch runs in place of the kernels."""
    return _counter.read()


def wait_for_sources(tensors: Iterable[Tensor], destination: torch.device) -> bool:
    """Order the current stream of `destination` after that of every other CUDA device a tensor lies on.

    Returns:
        whether any tensor lies elsewhere, so that `bring` must be called.
    """
    devices = {tensor.device for tensor in tensors} - {destination}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(destination).wait_stream(torch.cuda.current_stream(device))
    return bool(devices)


def bring(tensors: Sequence[Tensor], destination: torch.device) -> Sequence[Tensor]:
    """Return tensors that a kernel on `destination` can read: those given, or copies of unreadable ones.

    Call `wait_for_sources` first. What is read in place stays allocated until the current stream of
    `destination` has read it. A copy runs on the stream of a lane of the source.
    """
    foreign = [i for i, tensor in enumerate(tensors) if tensor.device != destination]
    brought = list(tensors)
    num_staged = 0
    for i in foreign:
        if _readable(tensors[i].device, destination):
            tensors[i].record_stream(torch.cuda.current_stream(destination))
        else:
            brought[i] = _stage(tensors[i], destination)
            num_staged += 1
    _counter.add(num_peer=len(foreign) - num_staged, num_staged=num_staged)
    return brought


def add_lane(device: torch.device, stream: torch.cuda.Stream) -> None:
    """Have copies from `device` run on `stream`, and enable peer access with devices that have lanes."""
    with _lock:
        _lane_streams[device.index] = stream
        for index in _lane_streams.keys() - {device.index}:
            pair = frozenset((index, device.index))
            if pair not in _peers:
                _peers[pair] = _enable_peer_access(torch.device(device.type, index), device)


def _stage(tensor: Tensor, destination: torch.device) -> Tensor:
    stream = _lane_streams.get(tensor.device.index) if tensor.device.type == "cuda" else None
    if stream is None:
        return tensor.to(destination, non_blocking=True)
    tensor.record_stream(stream)
    # Torch orders a copy behind the current streams of both devices, and the destination's behind the copy.
    # The destination's stream has waited for what writes this tensor, so the lane's stream waits for it too.
    with torch.cuda.stream(stream):
        return tensor.to(destination, non_blocking=True)


def _readable(source: torch.device, destination: torch.device) -> bool:
    """Return whether kernels on `destination` may read the memory of `source` in place."""
    if source.type != "cuda" or destination.type != "cuda":
        return False
    return _peers.get(frozenset((source.index, destination.index)), False)


def _enable_peer_access(first: torch.device, second: torch.device) -> bool:
    """Let two devices read each other's memory; return whether they can."""
    try:
        for a, b in ((first, second), (second, first)):
            if not torch.cuda.can_device_access_peer(a, b):
                return False
        for a, b in ((first, second), (second, first)):
            # Torch enables peer access at the first copy between two devices, for both allocators.
            torch.zeros(1, device=a).to(b)
    except RuntimeError:
        return False  # one device is lost, which must not fail the lane that opens on the other
    return True
