"""The agreement of processes on a step, as pure code: any number of processes, any failures, no process."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdp._distributed.agreement import (
    BITS,
    NO_ROWS,
    VERSION,
    Agreed,
    Computed,
    Decided,
    Exchange,
    Header,
    Kind,
    Reduce,
    Reduced,
    Report,
    Share,
    Texts,
    Voted,
    agree,
    bits_of,
    weights_of,
    words_of,
)

NUM_BUCKETS = 3


@dataclass
class FakePart:
    """A process that fails where it is told to."""

    rank: int
    kind: Kind = Kind.STEP
    rows: int = 4
    fails_at: str = ""
    number: int = 1
    num_done: int = 0
    text: str = "alike"
    is_diverged: bool = False
    needs_vote: bool = False
    late: tuple[bool, ...] = (False,) * NUM_BUCKETS
    state: bytes = b""
    stage: str = "begin"
    is_bound: bool = False

    def header(self) -> Header:
        kind = Kind.FAILED if self._has_failed() else self.kind
        numbers = (
            VERSION,
            self.number,
            self.num_done,
            kind,
            self.rows,
            len(self.text) + sum(map(ord, self.text)),
        )
        return Header(*numbers, False, self.needs_vote, self.is_diverged)

    def workload(self) -> str:
        return self.text

    def report(self, *, is_vote: bool) -> Report:
        failed = self.has_failed(is_vote=is_vote)
        loss = struct.unpack("<q", struct.pack("<d", 1.0))[0]
        return Report(failed, loss, 1, 0, len(self.state), words_of(self.late))

    def has_failed(self, *, is_vote: bool) -> bool:
        failed = self._has_failed()
        self.is_bound = self.is_bound or (is_vote and not failed)
        return failed

    def failure(self) -> str:
        return f"error of {self.rank}" if self._has_failed() else ""

    def _has_failed(self) -> bool:
        order = ["begin", "compute", "end"]
        fails = bool(self.fails_at) and order.index(self.fails_at) <= order.index(self.stage)
        return fails and not self.is_bound


def talk(parts: list[FakePart]) -> tuple[list[Decided], list[Any]]:
    """Run the agreement of all side by side; return how it ended, and what the first one asked for."""
    talks = [agree(part, part.rank, NUM_BUCKETS) for part in parts]
    requests: list[Any] = [next(each) for each in talks]
    asked = []
    while not any(isinstance(each, Decided) for each in requests):
        kinds = {type(each) for each in requests}
        assert len(kinds) == 1, "collectives pair"
        asked.append(requests[0])
        answer: Any = None
        match requests[0]:
            case Exchange():
                assert len({len(each.numbers) for each in requests}) == 1
                answer = [list(each.numbers) for each in requests]
            case Texts():
                answer = [each.text for each in requests]
            case Reduce() | Share():
                assert len({*requests}) == 1
            case Computed():
                for part in parts:
                    part.stage = "compute"
            case Voted():
                for part in parts:
                    part.stage = "end"
            case Agreed() | Reduced():
                pass
        requests = [each.send(answer) for each in talks]
    assert all(isinstance(each, Decided) for each in requests)
    return requests, asked


def parts_of() -> st.SearchStrategy[list[FakePart]]:
    one = st.builds(
        FakePart,
        rank=st.just(0),
        kind=st.sampled_from([Kind.STEP] * 6 + [*Kind][:5]),
        rows=st.sampled_from([NO_ROWS, 0, 1, 5]),
        fails_at=st.sampled_from([""] * 6 + ["begin", "compute", "end"]),
        number=st.sampled_from([1] * 12 + [2]),
        num_done=st.sampled_from([0] * 12 + [1]),
        text=st.sampled_from(["alike"] * 12 + ["another"]),
        is_diverged=st.sampled_from([False] * 12 + [True]),
        needs_vote=st.booleans(),
        late=st.tuples(*[st.booleans()] * NUM_BUCKETS),
        state=st.sampled_from([b"", b"state"]),
    )
    return st.lists(one, min_size=1, max_size=5).map(_numbered)


def _numbered(parts: list[FakePart]) -> list[FakePart]:
    for rank, part in enumerate(parts):
        part.rank = rank
    return parts


@settings(max_examples=300, deadline=None)
@given(parts_of())
def test_all_processes_decide_alike(parts: list[FakePart]) -> None:
    """Whatever fails, collectives pair, and all processes take the step or none does."""
    decided, _ = talk(parts)
    assert len({*decided}) == 1
    [end] = {*decided}
    if end.failure is None and not end.is_over:
        assert {part.kind for part in parts} <= {Kind.STEP, Kind.ENDED} or len(
            {part.kind for part in parts}
        ) == 1
        assert len({part.number for part in parts}) == len({part.num_done for part in parts}) == 1
        assert len({part.text for part in parts}) == 1
        assert not any(part.fails_at in ("begin", "compute") or part.is_diverged for part in parts)
        assert not any(part.fails_at == "end" for part in parts) or not any(part.needs_vote for part in parts)
    elif end.is_over:
        assert {part.kind for part in parts} <= {Kind.ENDED, Kind.LEFT}
    elif end.failure is not None and end.failure.cause.startswith("error of"):
        assert end.failure.cause == f"error of {end.failure.rank}"
        assert parts[end.failure.rank or 0].fails_at


def test_gradients_are_summed_once() -> None:
    """A step without troubles is two exchanges and one sum for each bucket."""
    _, asked = talk([FakePart(0), FakePart(1)])
    kinds = [type(each) for each in asked]
    assert kinds == [Exchange, Agreed, Reduce, Reduce, Reduce, Computed, Exchange, Reduced]


def test_late_gradients_are_summed_again() -> None:
    """A bucket that changed on one process after it was summed is summed again on all."""
    _, asked = talk([FakePart(0), FakePart(1, late=(False, True, False))])
    assert [each.bucket for each in asked if isinstance(each, Reduce)] == [0, 1, 2, 1]


def test_a_step_in_which_nobody_accumulates_sums() -> None:
    """Under no_sync nothing but the two exchanges is said."""
    _, asked = talk([FakePart(0, kind=Kind.ACCUMULATE), FakePart(1, kind=Kind.ACCUMULATE)])
    assert not any(isinstance(each, Reduce) for each in asked)


@pytest.mark.parametrize(
    ("rows", "weights"),
    [
        ([6, 2], [0.75, 0.25]),
        ([6, 0], [1.0, 0.0]),
        ([0, 0], [0.5, 0.5]),
        ([NO_ROWS, 3], [0.5, 0.5]),
        ([NO_ROWS, 0], [1.0, 0.0]),
    ],
)
def test_weights(rows: list[int], weights: list[float]) -> None:
    """A mean is weighted by rows; a process without any computes only where nobody has some."""
    headers = [FakePart(rank, rows=count).header() for rank, count in enumerate(rows)]
    assert weights_of(headers) == weights


def test_the_first_difference_is_named() -> None:
    """Processes that train different things are told the first line that differs."""
    decided, _ = talk([FakePart(0, text="a\nb 1\nc"), FakePart(1, text="a\nb 2\nd")])
    assert decided[0].failure is not None
    assert decided[0].failure[:2] == (1, "it has b 2 where process 0 has b 1")


@given(st.lists(st.booleans(), max_size=3 * BITS))
def test_flags_survive(flags: list[bool]) -> None:
    """Flags come back from the numbers that carry them, which fit 64 bits with a sign."""
    words = words_of(flags)
    assert all(0 <= word < 2**63 for word in words)
    assert bits_of(words, len(flags)) == [place for place, flag in enumerate(flags) if flag]
