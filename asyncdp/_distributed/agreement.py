"""How processes agree on one step: a protocol as pure code, free of threads, sockets and torch.

Every process runs `agree` for each of its steps, in the order of its steps. The generator yields requests;
collectives among them pair with those of the other processes, so every decision about what comes next is
made of what all of them have received, and never of what only one knows. A process that has failed goes on
to the end all the same, with nothing to add.
"""

from __future__ import annotations

import enum
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol

VERSION = 1
NO_ROWS = -1
"""Says of a batch that nobody knows how many rows it has."""


class Kind(enum.IntEnum):
    """What a process wants of a step."""

    STEP = 1
    ACCUMULATE = 2
    REDUCE_ONLY = 3
    ENDED = 4
    """Its stream of batches has ended: it takes part without rows, until the streams of all have."""
    LEFT = 5
    """It has left its stream of steps early."""
    FAILED = 6
    """Something failed before the step began."""
    SAVE = 7
    LOAD = 8


class Header(NamedTuple):
    """What a process says of a step as it begins; all of them numbers that fit 64 bits."""

    version: int
    number: int
    """Which of its process's steps this is, failed ones included."""
    num_done: int
    """Steps that were taken."""
    kind: int
    rows: int
    workload: int
    """A digest of what must be the same everywhere."""
    is_sum: int
    needs_vote: int
    """Whether something may fail after the gradients were summed."""
    is_diverged: int


class Report(NamedTuple):
    """What a process says of a step once it has computed its part."""

    has_failed: int
    loss: int
    """The bits of a float64."""
    loss_dtype: int
    earlier: int
    """A digest of the gradients that were there before the step."""
    num_state_bytes: int
    """How much there is to give to the others of what its forward changed in the module."""
    flags: tuple[int, ...]
    """True values as `words_of` them: first, which buckets changed after they were given to be summed."""

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Report:
        """Return the report that was given as numbers."""
        failed, loss, loss_dtype, earlier, num_state_bytes, *flags = numbers
        return cls(failed, loss, loss_dtype, earlier, num_state_bytes, tuple(flags))

    def numbers(self) -> list[int]:
        """Return the report as numbers."""
        return [*self[:-1], *self.flags]


class Failure(NamedTuple):
    """Why no process takes a step.

    Attributes:
        rank: of the process that is to blame, if one is.
        cause: what happened there.
        remedy: what to do about it; None for what is right after most failures.
    """

    rank: int | None
    cause: str
    remedy: str | None = None


_REJOIN = (
    "Processes no longer have the same state: call `await engine.rejoin(group)` on all of them, which gives "
    "everybody that of the process which has taken the most steps."
)
_IN_ORDER = (
    "Call the same steps in the same order on every process, failed ones included; one that has no rows "
    "takes part with a batch of zero rows."
)


class Part(Protocol):
    """One process's own part in a step."""

    def header(self) -> Header:
        """Say what the step is, or that it failed before it began."""

    def workload(self) -> str:
        """Describe what must be the same everywhere, one thing in each line."""

    def report(self, *, is_vote: bool) -> Report:
        """Say what came of the part; with `is_vote` it can fail no more from here on, if it has not."""

    def has_failed(self, *, is_vote: bool) -> bool:
        """Say whether it has failed; `is_vote` as for `report`."""

    def failure(self) -> str:
        """Say why it has failed; empty if it has not."""


class Exchange(NamedTuple):
    """Give numbers to all processes; answered by the numbers of each."""

    numbers: Sequence[int]


class Texts(NamedTuple):
    """Give a text to all processes; answered by the text of each."""

    text: str


class Agreed(NamedTuple):
    """All processes take this step; no answer, and no collective.

    Attributes:
        weight: of this process's loss in that of the step; 0 if it has nothing to compute.
        owner: the process whose forward's changes of the module survive.
    """

    weight: float
    owner: int


class Computed(NamedTuple):
    """Wait until this process has computed its part, or failed."""


class Reduce(NamedTuple):
    """Sum a bucket of gradients over all processes, once this one has it; one that failed adds nothing."""

    bucket: int


class Share(NamedTuple):
    """Give bytes of the process `owner` to all."""

    owner: int
    num_bytes: int


class Gathered(NamedTuple):
    """All processes do the same; no answer, and no collective.

    Attributes:
        texts: of each process.
    """

    texts: Sequence[str]


class Reduced(NamedTuple):
    """Everything has been summed; no answer, and no collective."""

    reports: Sequence[Report]


class Voted(NamedTuple):
    """Wait until this process has done all that can fail, or failed."""


class Decided(NamedTuple):
    """The end: the step is taken everywhere if `failure` is None, or nowhere.

    Attributes:
        failure: why not.
        is_over: whether it is not taken as the streams of all processes have ended.
    """

    failure: Failure | None = None
    is_over: bool = False


Request = Exchange | Texts | Agreed | Computed | Reduce | Share | Gathered | Reduced | Voted | Decided
Talk = Generator[Request, Any, None]


def agree(part: Part, rank: int, num_buckets: int) -> Talk:
    """Run the agreement on one step.

    Args:
        part: this process's own.
        rank: this process.
        num_buckets: how many buckets of gradients a step sums; part of the workload, so the same everywhere.
    """
    own = part.header()
    headers = [Header(*each) for each in (yield Exchange(own))]
    kinds = [Kind(each.kind) for each in headers if each.version == VERSION]
    failure = _refusal(headers, kinds)
    if failure is None and Kind.FAILED in kinds:
        failure = yield from _first_failure(part, kinds.index(Kind.FAILED))
    if failure is None and not {*kinds} <= {Kind.ENDED, Kind.LEFT}:
        failure = _left(kinds)
        if failure is None and len({each.workload for each in headers}) > 1:
            failure = first_difference((yield Texts(part.workload())))
        if failure is None:
            yield from _take(part, rank, headers, kinds, num_buckets)
            return
    yield Decided(failure, is_over=failure is None)


def _take(part: Part, rank: int, headers: Sequence[Header], kinds: Sequence[Kind], num_buckets: int) -> Talk:
    """Take a step that all processes want."""
    weights = weights_of(headers)
    owner = next((place for place, weight in enumerate(weights) if weight), 0)
    yield Agreed(weights[rank], owner)
    if Kind.ACCUMULATE not in kinds:
        for bucket in range(num_buckets):
            yield Reduce(bucket)
    yield Computed()
    needs_vote = any(each.needs_vote for each in headers)
    answers = yield Exchange(part.report(is_vote=not needs_vote).numbers())
    reports = [*map(Report.of, answers)]
    failed = next((place for place, each in enumerate(reports) if each.has_failed), None)
    if failed is not None:
        yield Decided((yield from _first_failure(part, failed)))
        return
    other = next((place for place, each in enumerate(reports) if each.earlier != reports[0].earlier), None)
    if other is not None:
        yield Decided(Failure(other, _EARLIER, _CLEAR))
        return
    if Kind.ACCUMULATE not in kinds:
        for bucket in bits_of(merged(reports, num_buckets), num_buckets):
            yield Reduce(bucket)
    if reports[owner].num_state_bytes:
        yield Share(owner, reports[owner].num_state_bytes)
    yield Reduced(reports)
    if needs_vote:
        yield Voted()
        votes = yield Exchange((int(part.has_failed(is_vote=True)),))
        failed = next((place for place, (vote,) in enumerate(votes) if vote), None)
        if failed is not None:
            yield Decided((yield from _first_failure(part, failed)))
            return
    yield Decided()


def gather(part: Part) -> Talk:
    """Run the agreement on something that all processes do between two steps: a checkpoint.

    Args:
        part: this process's own; its `workload` is what the others get.
    """
    headers = [Header(*each) for each in (yield Exchange(part.header()))]
    kinds = [Kind(each.kind) for each in headers if each.version == VERSION]
    failure = _refusal(headers, kinds)
    if failure is None and Kind.FAILED in kinds:
        failure = yield from _first_failure(part, kinds.index(Kind.FAILED))
    failure = failure or _left(kinds)
    if failure is None:
        yield Gathered((yield Texts(part.workload())))
        if any(each.needs_vote for each in headers):
            yield Voted()
            votes = yield Exchange((int(part.has_failed(is_vote=True)),))
            failed = next((place for place, (vote,) in enumerate(votes) if vote), None)
            failure = None if failed is None else (yield from _first_failure(part, failed))
    yield Decided(failure, is_over=True)


_EARLIER = "the gradients that it had before the step are not those of process 0"
_CLEAR = "Clear them with optimizer.zero_grad(), or make them by steps of the engine."


def _first_failure(part: Part, rank: int) -> Generator[Request, Any, Failure]:
    texts = yield Texts(part.failure())
    return Failure(rank, texts[rank])


def _refusal(headers: Sequence[Header], kinds: Sequence[Kind]) -> Failure | None:
    """Return why processes cannot go on together, as far as that can be seen by their headers."""
    first = headers[0]
    for rank, each in enumerate(headers):
        if each.version != first.version:
            cause = f"it speaks version {each.version} of the protocol, process 0 version {first.version}"
            return Failure(rank, cause, "Install the same version of asyncdp everywhere.")
        if each.is_diverged:
            return Failure(rank, "it has changed part of its state in a step that failed there", _REJOIN)
    for rank, each in enumerate(headers):
        if each.num_done != first.num_done:
            return Failure(rank, f"it has taken {each.num_done} steps, process 0 {first.num_done}", _REJOIN)
        if each.number != first.number:
            cause = f"it is out of step: at its call {each.number}, process 0 at its call {first.number}"
            return Failure(rank, cause, _IN_ORDER)
    if {Kind.FAILED, Kind.LEFT} & {*kinds}:
        return None
    first_kind = next((kind for kind in kinds if kind is not Kind.ENDED), Kind.ENDED)
    for rank, kind in enumerate(kinds):
        if kind is not first_kind and (kind, first_kind) != (Kind.ENDED, Kind.STEP):
            cause = f"it is out of step: it {_DOES[kind]}, another process {_DOES[first_kind]}"
            return Failure(rank, cause, _IN_ORDER)
    return None


_DOES = {
    Kind.STEP: "takes a step",
    Kind.ACCUMULATE: "accumulates under no_sync",
    Kind.REDUCE_ONLY: "reduces only",
    Kind.ENDED: "has ended its stream of batches",
    Kind.SAVE: "saves a checkpoint",
    Kind.LOAD: "loads a checkpoint",
}


def _left(kinds: Sequence[Kind]) -> Failure | None:
    if Kind.LEFT not in kinds:
        return None
    return Failure(kinds.index(Kind.LEFT), "it has left its stream of steps early")


def weights_of(headers: Sequence[Header]) -> list[float]:
    """Return the weight of each process's loss in that of a step; 0 for those with nothing to compute.

    By their rows, if all have some. A process without rows computes only where no other has any, which gives
    what a single device gives for a batch without rows.
    """
    rows = [0 if each.kind == Kind.ENDED else each.rows for each in headers]
    takes_part = [each.kind != Kind.ENDED for each in headers]
    if any(takes_part) and (any(count > 0 for count in rows) or NO_ROWS in rows):
        takes_part = [count != 0 for count in rows]
    if headers[0].is_sum:
        return [float(each) for each in takes_part]
    if NO_ROWS in rows or not any(rows):
        return [each / sum(takes_part) for each in takes_part]
    return [count / sum(rows) for count in rows]


def first_difference(texts: Sequence[str]) -> Failure:
    """Return the first line in which a process differs from the first one."""
    first = texts[0].splitlines()
    for rank, text in enumerate(texts):
        lines = text.splitlines()
        for place in range(max(len(first), len(lines))):
            expected = first[place] if place < len(first) else "nothing more"
            got = lines[place] if place < len(lines) else "nothing more"
            if got != expected:
                return Failure(rank, f"it has {got} where process 0 has {expected}", _SAME)
    return Failure(None, "processes train different things, which look alike", _SAME)


_SAME = "Train the same module with the same options and an optimizer over the same tensors on every process."


BITS = 62
"""Flags in one number."""


def num_words(count: int) -> int:
    """Return how many numbers `count` flags take."""
    return -(-count // BITS)


def words_of(flags: Sequence[object]) -> tuple[int, ...]:
    """Return true values as bits of numbers."""
    return tuple(
        sum(1 << place for place, flag in enumerate(flags[begin : begin + BITS]) if flag)
        for begin in range(0, len(flags), BITS)
    )


def bits_of(words: Sequence[int], count: int) -> list[int]:
    """Return the places of the first `count` bits that are set."""
    return [place for place in range(count) if words[place // BITS] >> place % BITS & 1]


def merged(reports: Sequence[Report], count: int, skip: int = 0) -> list[int]:
    """Return which of `count` flags any report has, as numbers; they come after `skip` other numbers."""
    found = [0] * num_words(count)
    for each in reports:
        for place, word in enumerate(each.flags[skip : skip + len(found)]):
            found[place] |= word
    return found
