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
    Decided,
    Exchange,
    Failure,
    Gathered,
    Kind,
    Reduce,
    Reduced,
    Request,
    Share,
    Texts,
    agree,
    gather,
)
from .exchange import Intent, StepExchange
from .meeting import Meeting
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
        notices: what one process has to say to the others at no particular time.
    """

    def __init__(self, transport: Transport, num_done: int = 0) -> None:
        self.rank, self.size = transport.rank, transport.size
        self.notices = transport.notices
        self._talk = _Talk(transport, num_done)
        weakref.finalize(self, self._talk.queue.put, None).atexit = False

    @property
    def progress(self) -> tuple[int, bool]:
        """How many steps all processes have taken together, and whether this one has diverged since."""
        return self._talk.progress()

    def exchange(self, intent: Intent) -> StepExchange:
        """Make this process's part in a step; nothing is said yet."""
        return StepExchange(intent, self._talk.submit, self._talk.progress, self._talk.next_number)

    def meeting(self, kind: Kind) -> Meeting:
        """Make this process's part in something that all do between two steps, and number it."""
        intent = Intent(kind, needs_vote=kind is Kind.LOAD)
        meeting = Meeting(intent, self._talk.submit, self._talk.progress, self._talk.next_number)
        meeting.take_number()
        return meeting

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
        self.is_diverged = False
        self._numbers = itertools.count(1)
        self._rank, self._size = transport.rank, transport.size
        self._transport: Transport | None = transport
        self._failure: Failure | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._latest: StepExchange | None = None

    def progress(self) -> tuple[int, bool]:
        return self.num_done, self.is_diverged

    def next_number(self) -> int:
        return next(self._numbers)

    def submit(self, step: StepExchange) -> None:
        """Begin a step, or have the thread drive one on."""
        with self._lock:
            if self._failure is None:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="asyncdp-processes", daemon=True)
                    self._thread.start()
                self.queue.put(step)
                return
        step.on_decided(Decided(self._failure))

    def close(self, timeout: float | None) -> None:
        latest = self._latest
        if latest is not None:
            latest.fail("its engine was closed")
        with self._lock:
            if self._failure is None:
                self._failure = Failure(None, "the engine is closed", "Make a new one.")
            self.queue.put(None)
            thread = self._thread
        if thread is None:
            self._transport = None
        elif thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        while (step := self.queue.get()) is not None:
            transport = self._transport
            if transport is None:
                step.on_decided(Decided(self._failure))
            elif step is not self._latest:
                self._latest = step
                step.drive = _Drive(step, transport, self).go_on
            step.drive()
            del step, transport
        self._latest = self._transport = None

    def note_taken(self) -> None:
        self.num_done += 1

    def give_up(self, error: BaseException) -> Failure:
        """Close the connections, so that all others notice, after one has failed."""
        with self._lock:
            text = str(error).partition("\n")[0]
            rank = 1 - self._rank if self._size == 2 else None
            self._failure = Failure(rank, f"the connection is lost ({text})", _REJOIN)
            self._transport = None
            return self._failure


class _Drive:
    """The talk about one step. For any thread.

    Args:
        step: this process's part.
        transport: to the others.
        talk: hears how it ended.
    """

    def __init__(self, step: StepExchange, transport: Transport, talk: _Talk) -> None:
        layout = None if step.intent.workload is None else step.intent.workload.layout
        num_buckets = 0 if layout is None else len(layout.buckets)
        is_meeting = isinstance(step, Meeting)
        self._requests = gather(step) if is_meeting else agree(step, transport.rank, num_buckets)
        self._request: Request | None = None
        self._step: StepExchange | None = step
        self._transport: Transport | None = transport
        self._talk = talk
        self._lock = threading.Lock()

    def go_on(self) -> None:
        """Go on until something is needed that this process does not have yet."""
        with self._lock:
            step, transport = self._step, self._transport
            if step is None or transport is None:
                return  # it has ended
            try:
                if self._request is None:
                    self._request = next(self._requests)
                while step.is_ready(self._request):
                    if isinstance(self._request, Decided):
                        self._end(step, self._request)
                        return
                    self._request = self._requests.send(_perform(self._request, step, transport))
            except Exception as error:
                del transport
                self._transport = None
                self._end(step, Decided(self._talk.give_up(error)))

    def _end(self, step: StepExchange, decided: Decided) -> None:
        if self._transport is not None:
            step.wait_sums()  # of a step that failed: they write to what must not be freed
        if decided.failure is None and not decided.is_over:
            self._talk.note_taken()
        self._step = self._transport = None
        step.on_decided(decided)


def _perform(request: Request, step: StepExchange, transport: Transport) -> Any:
    """Do what a request says; return its answer."""
    match request:
        case Exchange(numbers):
            return transport.exchange(numbers)
        case Texts(text):
            return transport.exchange_texts(text)
        case Agreed():
            step.on_agreed(request)
        case Reduce(bucket):
            step.on_sum(bucket, transport.begin_sum(step.take_bucket(bucket)))
        case Share(owner, num_bytes):
            step.on_state(_share(transport, owner, num_bytes, step))
        case Gathered(texts):
            assert isinstance(step, Meeting)
            step.on_gathered(texts)
        case Reduced(reports):
            step.wait_sums()
            step.on_reduced(reports)
    return None


def _share(transport: Transport, owner: int, num_bytes: int, step: StepExchange) -> bytes:
    own = step.take_state(owner == transport.rank)
    values = torch.frombuffer(bytearray(own or bytes(num_bytes)), dtype=torch.uint8)
    return bytes_of(transport.share(values, owner))


def bytes_of(tensor: Tensor) -> bytes:
    """Return the values of a tensor of bytes."""
    return tensor.numpy().tobytes()
