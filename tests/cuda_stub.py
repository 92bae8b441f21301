"""CUDA as torch shows it, without a device: streams and events over virtual time.

A stream is the time at which it is done with what was issued. Nothing runs: time passes when something
waits for an event, and with `kernel`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from asyncdp._devices import cuda, cuda_clock
from asyncdp._kernels import transfer


class Stream:
    """Runs one operation after the other."""

    def __init__(self, stub: CudaStub, name: str) -> None:
        self.stub = stub
        self.name = name
        self.done_at = 0.0

    def __repr__(self) -> str:
        return self.name

    def wait_event(self, event: Event) -> None:
        self.stub.log.append(f"{self} waits for {event}")
        self.done_at = max(self.done_at, event.reached_at)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.stub)
        event.record(other)
        self.wait_event(event)

    def query(self) -> bool:
        self.stub.check()
        return self.done_at <= self.stub.now

    def synchronize(self) -> None:
        self.stub.before_waiting()
        self.stub.check()
        self.stub.pass_time(self.done_at)


class Event:
    """A moment on a stream."""

    def __init__(self, stub: CudaStub, enable_timing: bool = False, blocking: bool = False) -> None:
        stub.check()
        self.stub = stub
        self.is_timed = enable_timing
        self.name = f"event {next(stub.ordinals)}"
        self.reached_at = 0.0
        if enable_timing:
            stub.timed_by.append(threading.current_thread())

    def __repr__(self) -> str:
        return self.name

    def record(self, stream: Stream) -> None:
        self.stub.log.append(f"{stream} records {self}")
        self.reached_at = max(stream.done_at, self.stub.now)

    def query(self) -> bool:
        self.stub.check()
        return self.reached_at <= self.stub.now

    def synchronize(self) -> None:
        self.stub.before_waiting()
        self.stub.check()
        self.stub.pass_time(self.reached_at)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds, as torch has it."""
        assert self.is_timed
        assert end.is_timed
        assert end.query()
        return (end.reached_at - self.reached_at) * 1000


class CudaStub:
    """A substitute for the device; `log` has the operations of all streams, in order.

    `before_waiting` is called by every thread that is about to wait for an event or a stream.
    """

    def __init__(self) -> None:
        self.before_waiting: Callable[[], object] = bool
        self.now = 0.0
        self.lost = False
        self.log: list[str] = []
        self.timed_by: list[threading.Thread] = []  # who made timed events
        self.ordinals = itertools.count()
        self._num_streams = {"stream": itertools.count(), "urgent": itertools.count()}
        self._local = threading.local()
        self._default = Stream(self, "default")

    def __deepcopy__(self, memo: object) -> CudaStub:
        return self  # a module that has it shares it with its replicas

    def check(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def pass_time(self, until: float) -> None:
        self.now = max(self.now, until)

    def make_stream(self, device: Any = None, priority: int = 0) -> Stream:
        kind = "urgent" if priority < 0 else "stream"
        return Stream(self, f"{kind} {next(self._num_streams[kind])}")

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._local, "stream", self._default)

    def set_stream(self, stream: Stream) -> None:
        self._local.stream = stream

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self._local.stream = stream
        yield
        self._local.stream = before

    def kernel(self, seconds: float) -> None:
        """Keep the current stream busy."""
        stream = self.current_stream()
        stream.done_at = max(stream.done_at, self.now) + seconds

    def watch_copies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Log which tensors are pinned, copied on which stream, and recorded on which stream."""
        to = torch.Tensor.to

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            self.log.append(f"pin {tensor.tolist()}")
            return tensor.clone()

        def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("non_blocking"):
                self.log.append(f"{self.current_stream()} copies {tensor.tolist()}")
            return to(tensor, *args, **kwargs)

        def lend(tensor: torch.Tensor, stream: Stream) -> None:
            self.log.append(f"{stream} borrows {tensor.tolist()}")

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch.Tensor, "to", move)
        monkeypatch.setattr(torch.Tensor, "record_stream", lend)

    def compare_clocks_always(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the clocks of host and device compared anew for each task, not once a second."""
        monkeypatch.setattr(cuda_clock, "_MAX_AGE_SECONDS", 0.0)

    def lane(self, index: int = 0) -> cuda.CudaLane:
        """Make a CUDA lane whose tensors are on the CPU."""
        return cuda.CudaLane(torch.device("cpu", index))


@pytest.fixture
def cuda_stub(monkeypatch: pytest.MonkeyPatch) -> CudaStub:
    """Have CUDA lanes and their clocks use a stub."""
    stub = CudaStub()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", stub.make_stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda **kwargs: Event(stub, **kwargs))
    monkeypatch.setattr(torch.cuda, "current_stream", stub.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", stub.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", stub.set_stream)
    monkeypatch.setattr(transfer, "_lane_streams", {})
    monkeypatch.setattr(transfer, "_peers", {})
    monkeypatch.setattr(cuda_clock, "_clocks", {})
    return stub
