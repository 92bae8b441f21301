"""How tensors of other devices reach a kernel: read in place by peers, or staged by a copy first.

Which devices read each other is found out when their lanes open, on the lanes' own threads, and only between
devices that have lanes: merely to ask another one would cost it a context.
"""

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
_lock = threading.Lock()
_lane_streams: dict[int, torch.cuda.Stream] = {}  # of one lane on each device; torch never destroys streams
_peers: dict[frozenset[int], bool] = {}


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
    """Have copies of what lies on `device` run on `stream`, and open the ways to devices that have lanes."""
    with _lock:
        _lane_streams[device.index] = stream
        for index in _lane_streams.keys() - {device.index}:
            pair = frozenset((index, device.index))
            if pair not in _peers:
                _peers[pair] = _open_way(torch.device(device.type, index), device)


def _stage(tensor: Tensor, destination: torch.device) -> Tensor:
    stream = _lane_streams.get(tensor.device.index) if tensor.device.type == "cuda" else None
    if stream is None:
        return tensor.to(destination, non_blocking=True)
    tensor.record_stream(stream)
    # Torch orders a copy behind the current streams of both ends, and that of the destination behind the
    # copy. The destination's has waited for whatever makes this tensor, and so does this stream.
    with torch.cuda.stream(stream):
        return tensor.to(destination, non_blocking=True)


def _readable(source: torch.device, destination: torch.device) -> bool:
    """Tell whether kernels on `destination` may read the memory of `source` in place."""
    if source.type != "cuda" or destination.type != "cuda":
        return False
    return _peers.get(frozenset((source.index, destination.index)), False)


def _open_way(one: torch.device, other: torch.device) -> bool:
    """Let two devices read each other's memory, and tell whether they can."""
    try:
        for a, b in ((one, other), (other, one)):
            if not torch.cuda.can_device_access_peer(a, b):
                return False
        for a, b in ((one, other), (other, one)):
            # Torch opens the way at the first copy between two devices, in both allocators' memory.
            torch.zeros(1, device=a).to(b)
    except RuntimeError:
        return False  # one of them is lost, for which the lane that opens here is not to blame
    return True
