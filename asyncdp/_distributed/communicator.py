"""The thread by which one engine talks to the same engine in other processes."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from .agreement import (
    Agreed,
    Computed,
    Decided,
    Exchange,
    Failure,
    Reduce,
    Reduced,
    Share,
    Texts,
    Voted,
    agree,
)
from .exchange import Intent, StepExchange
from .transport import Transport

_REJOIN = (
    "Nothing of the step remains here, and calls go on. To train on with the processes that are left or came "
    "back, call `await engine.rejoin(group)` on all of them with a new process group."
)


class Communicator:
    """Talks to the same engine in other processes, about its steps in the order in which they begin.

    Args:
        transport: to the others; used up by this.
        num_done: steps that they have taken together before.

    Attributes:
        rank: of this process.
        size: how many processes there are.
    """

    def __init__(self, transport: Transport, num_done: int = 0) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._talk = _Talk(transport, num_done)
        weakref.finalize(self, self._talk.queue.put, None).atexit = False

    @property
    def progress(self) -> tuple[int, bool]:
        """How many steps all processes have taken together, and whether this one has diverged since."""
        return self._talk.progress()

    def exchange(self, intent: Intent) -> StepExchange:
        """Make this process's part in a step; nothing is said yet."""
        return StepExchange(intent, self._talk.submit, self._talk.progress, self._talk.next_number)

    def diverge(self) -> None:
        """Have all later steps refused: this process has changed part of its state in a failed one."""
        self._talk.is_diverged = True

    def close(self, timeout: float | None) -> None:
        """Let the thread end after the steps it has; wait for it for `timeout` seconds."""
        self._talk.close(timeout)


class _Talk:
    """What the thread has; the communicator itself must be able to go while it runs."""

    def __init__(self, transport: Transport, num_done: int) -> None:
        self.queue: queue.SimpleQueue[StepExchange | None] = queue.SimpleQueue()
        self.num_done = num_done
        self._numbers = itertools.count(1)
        self.is_diverged = False
        self._rank = transport.rank
        self._transport: Transport | None = transport
        self._failure: Failure | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._current: StepExchange | None = None

    def progress(self) -> tuple[int, bool]:
        return self.num_done, self.is_diverged

    def next_number(self) -> int:
        return next(self._numbers)

    def submit(self, step: StepExchange) -> None:
        with self._lock:
            if self._failure is None:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="asyncdp-processes", daemon=True)
                    self._thread.start()
                self.queue.put(step)
                return
        step.on_decided(Decided(self._failure))

    def close(self, timeout: float | None) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = Failure(None, "the engine is closed", "Make a new one.")
            self.queue.put(None)
            thread, current = self._thread, self._current
        if current is not None:
            current.fail("its engine was closed")
        if thread is None:
            self._transport = None
        elif thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        while (step := self.queue.get()) is not None:
            self._current = step
            if self._transport is None:
                step.on_decided(Decided(self._failure))
            else:
                try:
                    self._agree(step)
                except Exception as error:
                    self._break(error)
                    step.on_decided(Decided(self._failure))
            self._current = step = None
        self._transport = None

    def _break(self, error: BaseException) -> None:
        """Close the connections, so that all others notice, after one has failed."""
        transport = self._transport
        size, rank = (2, self._rank) if transport is None else (transport.size, transport.rank)
        with self._lock:
            text = str(error).partition("\n")[0]
            self._failure = Failure(
                1 - rank if size == 2 else None, f"the connection is lost ({text})", _REJOIN
            )
            self._transport = None

    def _agree(self, step: StepExchange) -> None:
        layout = None if step.intent.workload is None else step.intent.workload.layout
        talk = agree(step, self._rank, 0 if layout is None else len(layout.buckets))
        answer: Any = None
        request = next(talk)
        while not isinstance(request, Decided):
            answer = self._perform(request, step)
            request = talk.send(answer)
        self.num_done += request.failure is None and not request.is_over
        step.on_decided(request)

    def _perform(self, request: Any, step: StepExchange) -> Any:
        transport = self._transport
        assert transport is not None, "only this thread lets go of it"
        match request:
            case Exchange(numbers):
                return transport.exchange(numbers)
            case Texts(text):
                return transport.exchange_texts(text)
            case Agreed():
                step.on_agreed(request)
            case Computed():
                step.wait_computed()
            case Reduce(bucket):
                step.on_sum(bucket, transport.sum(step.take_bucket(bucket)))
            case Share(owner, num_bytes):
                step.on_state(_share(transport, owner, num_bytes, step))
            case Reduced(reports):
                step.on_reduced(reports)
            case Voted():
                step.wait_voted()
        return None


def _share(transport: Transport, owner: int, num_bytes: int, step: StepExchange) -> bytes:
    own = step.take_state(owner == transport.rank)
    values = torch.frombuffer(bytearray(own or bytes(num_bytes)), dtype=torch.uint8)
    return bytes_of(transport.share(values, owner))


def bytes_of(tensor: Tensor) -> bytes:
    """Return the values of a tensor of bytes."""
    return tensor.numpy().tobytes()
