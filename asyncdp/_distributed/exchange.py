"""One step's part of this process, between its lanes and the thread that talks to the other processes."""

from __future__ import annotations

import enum
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch_private import version_of
from ..errors import PeerStepError
from .agreement import (
    NO_ROWS,
    VERSION,
    Agreed,
    Computed,
    Decided,
    Header,
    Kind,
    Reduce,
    Report,
    Request,
    Voted,
    bits_of,
    merged,
    num_words,
    words_of,
)
from .digest import digest_of
from .layout import Gradients, Layout

MAX_TEXT = 4000


class Stage(enum.IntEnum):
    """How far the processes have come with a step."""

    NEW = 0
    BEGUN = 1
    AGREED = 2
    REDUCED = 3
    DECIDED = 4


@dataclass
class Workload:
    """What all processes must train alike.

    Attributes:
        layout: of the gradients.
        text: describes it, one thing in each line.
        digest: of the text.
    """

    layout: Layout
    text: str
    digest: int


@dataclass
class Intent:
    """What this process wants of a step.

    Attributes:
        kind: one of them.
        rows: of its batches; None if nobody knows.
        workload: None if it failed before that was known.
        is_sum: whether losses are added up, not averaged.
        needs_vote: whether something may fail after the gradients were summed.
        settings: what else must be the same everywhere as the step begins; earlier steps may change it.
        number: which of the process's steps it is.
    """

    kind: Kind
    rows: int | None = 0
    workload: Workload | None = None
    is_sum: bool = False
    needs_vote: bool = False
    settings: str = ""
    number: int = 0


@dataclass
class Contribution:
    """What this process's lanes have computed.

    Attributes:
        gradients: one for each tensor of the layout.
        accumulated: of earlier steps, which have their weights already.
        loss: of this process's rows, 0-d; None if it has computed nothing.
        earlier: a digest of the gradients that were there before.
        state: bytes for the others, if this process's changes of the module survive.
    """

    gradients: Sequence[Tensor | None]
    accumulated: Sequence[Gradients]
    loss: Tensor | None
    earlier: int = 0
    state: bytes = b""


@dataclass
class Totals:
    """What all processes have computed together.

    Attributes:
        gradients: one for each tensor of the layout, None where no process has any.
        loss: the sum of all shares.
        loss_dtype: of the shares.
        state: bytes of the process whose changes of the module survive.
    """

    gradients: list[Tensor | None]
    loss: float
    loss_dtype: torch.dtype
    state: bytes


_LOSS_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@dataclass
class _Given:
    """A bucket, what it was made of, and what is to be added to it as it is."""

    flat: Tensor
    sources: list[tuple[int, int] | None]
    accumulated: Sequence[Gradients]


class StepExchange:
    """One step of this process, as its lanes see it and as the communication thread does.

    Lanes call `weight`, `offer`, `reduce`, `vote`; whoever finds that the step fails calls `fail`. The talk
    with the other processes begins on the communication thread. Once all have begun, whoever gives something
    to it drives it on, a lane in most cases; one that fails leaves that to the communication thread.

    Args:
        intent: what the step is.
        submit: gives the step to the communication thread.
        progress: tells how many steps were taken, and whether this process has diverged.
        next_number: numbers the step when it begins, if nobody has before.
    """

    what = "the step"

    def __init__(
        self,
        intent: Intent,
        submit: Callable[[StepExchange], None],
        progress: Callable[[], tuple[int, bool]],
        next_number: Callable[[], int],
    ) -> None:
        self.intent = intent
        self.agreed: Agreed | None = None
        self.drive: Callable[[], None] = lambda: None
        """Goes on with the talk as far as possible; set by who talks."""
        self.is_over = False
        self._submit = submit
        self._progress = progress
        self._next_number = next_number
        self._stage = Stage.NEW
        self._changed = threading.Condition()
        self._error: str | None = None
        self._decided: Decided | None = None
        self._is_bound = False
        self._has_voted = False
        self._computed: Contribution | None = None
        self._given: dict[int, _Given] = {}
        self._late: list[bool] = []
        self._sums: dict[int, Tensor] = {}
        self._pending: dict[int, Callable[[], Tensor]] = {}
        self._reports: Sequence[Report] = ()
        self._state = b""

    # --- for lanes and event loops

    def take_number(self) -> None:
        """Give the step its number among those of this process, in the order of calls."""
        self.intent.number = self._next_number()

    def begin(self, settings: str = "") -> None:
        """Tell the other processes that this one begins the step, with the settings of now."""
        with self._changed:
            if self._stage is not Stage.NEW:
                return
            self._stage = Stage.BEGUN
            self.intent.settings = settings
        if not self.intent.number:
            self.take_number()
        self._submit(self)

    @property
    def has_begun(self) -> bool:
        """Whether the other processes hear of it."""
        return self._stage is not Stage.NEW

    def fail(self, error: BaseException | str) -> None:
        """Have the step fail everywhere, unless this process has said already that it will not."""
        with self._changed:
            if self._error is not None or self._is_bound or self._decided is not None:
                return
            text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
            self._error = text[:MAX_TEXT]
            self._changed.notify_all()
            has_begun = self.has_begun
        if has_begun:
            self._submit(self)  # nobody else may drive the talk on
        else:
            self.begin()

    def weight(self) -> float | None:
        """Wait until all processes have begun; return the weight of what this one computes.

        Returns:
            None if this process has failed meanwhile, and nothing needs to be computed any more.

        Raises:
            PeerStepError: the step is not taken.
        """
        if self._stage is Stage.AGREED and self._error is None:  # the lane's next batch
            assert self.agreed is not None
            return self.agreed.weight
        return self.agreed.weight if self._wait(Stage.AGREED) and self.agreed is not None else None

    def is_owner(self, rank: int) -> bool:
        """Return whether what the forward of this process changed survives; after `weight`."""
        return self.agreed is not None and self.agreed.owner == rank

    def offer(self, bucket: int, gradients: Gradients, accumulated: Sequence[Gradients] = ()) -> None:
        """Give a bucket, also early, when its gradients are most likely complete."""
        assert self.intent.workload is not None
        layout = self.intent.workload.layout.buckets[bucket]
        given = _Given(layout.flat(gradients), _sources(gradients, layout.places), accumulated)
        _wait_issued(given.flat)
        with self._changed:
            self._given[bucket] = given
        if self._stage >= Stage.AGREED:
            self.drive()

    def reduce(self, computed: Contribution) -> Totals | None:
        """Give what was computed; return the totals of all processes, or None as `weight`.

        Raises:
            PeerStepError: the step is not taken.
        """
        assert self.intent.workload is not None
        layout = self.intent.workload.layout
        gradients = computed.gradients
        if self.intent.kind is not Kind.ACCUMULATE:
            for place, bucket in enumerate(layout.buckets):
                given = self._given.get(place)
                is_late = given is not None and given.sources != _sources(gradients, bucket.places)
                self._late.append(is_late)
                layout.is_early[place] = layout.is_early[place] and not is_late
                if given is None:
                    self.offer(place, gradients, computed.accumulated)
        with self._changed:
            self._computed = computed
        if self._wait(Stage.AGREED):
            self.drive()
        return self._totals(layout) if self._wait(Stage.REDUCED) else None

    def vote(self) -> bool:
        """Say that this process has done all that can fail; return False if it has failed meanwhile.

        Raises:
            PeerStepError: the step is not taken.
        """
        with self._changed:
            self._has_voted = True
        self.drive()
        return self._wait(Stage.DECIDED)

    def _wait(self, stage: Stage) -> bool:
        """Block until the processes have come so far; return False if this one has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._stage >= stage or self._error is not None)
            if self._error is not None:
                return False
            decided = self._decided
        if decided is not None and decided.failure is not None:
            raise PeerStepError(*decided.failure, self.what)
        return True

    def _totals(self, layout: Layout) -> Totals:
        computed, intent, agreed = self._computed, self.intent, self.agreed
        assert computed is not None
        assert agreed is not None
        shares = [struct.unpack("<d", struct.pack("<q", each.loss))[0] for each in self._reports]
        dtype = next((each.loss_dtype for each in self._reports if each.loss_dtype), 1)
        gradients: list[Tensor | None] = [*computed.gradients]
        if intent.kind is not Kind.ACCUMULATE:
            count, skip = layout.num_tensors, num_words(len(layout.buckets))
            used = {*bits_of(merged(self._reports, count, skip), count)}
            sparse = {*bits_of(merged(self._reports, count, skip + num_words(count)), count)}
            for place, bucket in enumerate(layout.buckets):
                for position, total in zip(bucket.places, bucket.split(self._sums[place]), strict=True):
                    gradients[position] = None if position not in used else total
                    if position in sparse:
                        gradients[position] = total.to_sparse(1)
        return Totals(gradients, sum(shares), _LOSS_DTYPES[dtype - 1], self._state)

    # --- for who talks to the other processes

    def header(self) -> Header:
        """Say what the step is."""
        intent = self.intent
        num_done, is_diverged = self._progress()
        kind = intent.kind if self._error is None else Kind.FAILED
        return Header(
            VERSION,
            intent.number,
            num_done,
            kind,
            NO_ROWS if intent.rows is None else intent.rows,
            0 if intent.workload is None else intent.workload.digest ^ digest_of(intent.settings),
            intent.is_sum,
            intent.needs_vote,
            is_diverged,
        )

    def workload(self) -> str:
        """Describe what must be the same everywhere."""
        text = "" if self.intent.workload is None else self.intent.workload.text
        return f"{text}\n{self.intent.settings}"

    def report(self, *, is_vote: bool) -> Report:
        """Say what came of this process's part."""
        failed = self.has_failed(is_vote=is_vote)
        computed, num_tensors = self._computed, 0
        if self.intent.workload is not None:
            num_tensors = self.intent.workload.layout.num_tensors
            self._late = self._late or [False] * len(self.intent.workload.layout.buckets)
        gradients = [None] * num_tensors if failed or computed is None else computed.gradients
        flags = [
            self._late,
            [each is not None for each in gradients],
            [each is not None and each.layout is not torch.strided for each in gradients],
        ]
        words = tuple(word for each in flags for word in words_of(each))
        if failed or computed is None:
            return Report(1, 0, 0, 0, 0, words)
        loss, dtype = 0.0, 0
        if computed.loss is not None:
            assert self.agreed is not None
            loss = float(computed.loss) * self.agreed.weight
            dtype = 1 + (
                _LOSS_DTYPES.index(computed.loss.dtype) if computed.loss.dtype in _LOSS_DTYPES else 1
            )
        bits: int = struct.unpack("<q", struct.pack("<d", loss))[0]
        return Report(0, bits, dtype, computed.earlier, len(computed.state), words)

    def has_failed(self, *, is_vote: bool) -> bool:
        """Say whether this process has failed; with `is_vote` it is bound by the answer."""
        with self._changed:
            self._is_bound = self._is_bound or (is_vote and self._error is None)
            return self._error is not None

    def failure(self) -> str:
        """Say why this process has failed."""
        return self._error or ""

    def is_ready(self, request: Request) -> bool:
        """Return whether this process has what the request needs; one that has failed needs nothing."""
        with self._changed:
            if self._error is not None:
                return True
            match request:
                case Reduce(bucket):
                    return bucket in self._given
                case Computed():
                    return self._computed is not None
                case Voted():
                    return self._has_voted
            return True

    def take_bucket(self, place: int) -> Tensor:
        """Return what this process adds to the sum of a bucket; a second time, as it is by now."""
        assert self.intent.workload is not None
        bucket = self.intent.workload.layout.buckets[place]
        with self._changed:
            given, computed = self._given.get(place), self._computed
        if given is None:
            return bucket.zeros()
        is_late = computed is not None and place in self._pending
        flat = bucket.flat(computed.gradients) if is_late and computed is not None else given.flat
        assert self.agreed is not None, "buckets come after that"
        if self.agreed.weight != 1.0:
            flat.mul_(self.agreed.weight)
        for each in given.accumulated:
            flat.add_(bucket.flat(each))
        return flat

    def take_state(self, owner: bool) -> bytes:
        """Return the bytes for the others."""
        return self._computed.state if owner and self._computed is not None else b""

    def on_agreed(self, agreed: Agreed) -> None:
        """Let the lanes go on."""
        self.agreed = agreed
        self._go(Stage.AGREED)

    def on_sum(self, place: int, wait: Callable[[], Tensor]) -> None:
        """Note what waits for the sum of a bucket."""
        if place in self._pending:
            self._pending[place]()
        self._pending[place] = wait

    def wait_sums(self) -> None:
        """Wait for all sums that were begun."""
        for place in [*self._pending]:
            self._sums[place] = self._pending.pop(place)()

    def on_state(self, state: bytes) -> None:
        """Note the bytes of the process whose changes of the module survive."""
        self._state = state

    def on_reduced(self, reports: Sequence[Report]) -> None:
        """Let a lane end the step."""
        self._reports = reports
        self._go(Stage.REDUCED)

    def on_decided(self, decided: Decided) -> None:
        """Let everybody know what becomes of the step."""
        self.is_over = decided.is_over
        self._decided = decided
        self._go(Stage.DECIDED)

    def _go(self, stage: Stage) -> None:
        with self._changed:
            self._stage = stage
            self._changed.notify_all()


def _sources(gradients: Gradients, places: Sequence[int]) -> list[Any]:
    """Return what changes if a gradient of a bucket does."""
    found = [gradients[place] for place in places]
    return [None if each is None else (id(each), version_of(each)) for each in found]


def _wait_issued(tensor: Tensor) -> None:
    """Block until what this thread has issued is done: the other thread has another stream."""
    if tensor.device.type == "cuda":
        torch.cuda.current_stream(tensor.device).synchronize()
