"""A module as one lane runs it in one pass, in the state that it had at the call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .copies import Copies
from .replica import Replica, Substitutions, substitutions
from .snapshot import AttributeMap, ModuleSnapshot
from .survivors import Carried, Link
from .writes import ParameterWatch, WrittenParameters

_requires_grad = attrgetter("requires_grad")


class ModuleState(NamedTuple):
    """All of a module that a caller may change between two calls, as of one call.

    Calls between which nothing changed have the very same one.
    """

    snapshot: ModuleSnapshot
    training: list[bool]
    """The mode of every module of the snapshot."""
    requires: list[bool] | None
    """Which of the snapshot's tensors require gradients; None if none are to be recorded."""
    carried: Link
    """The latest of what forwards had carried into the module."""

    @property
    def kind(self) -> Hashable:
        """What passes have in common that are likely to write the same parameters."""
        return self.training[0], self.requires is not None

    def with_carried_tensors(self) -> ModuleState:
        """Return the state with what forwards have put in the place of parameters and buffers since.

        What the caller has put there since is not that of the call.
        """
        if self.carried.next is None or not (tensors := self.carried.tensors_since(self.snapshot)):
            return self
        snapshot = self.snapshot.with_tensors(tensors)
        requires = self.requires
        if requires is not None:
            known = dict(zip(map(id, self.snapshot.tensors), requires, strict=True))
            requires = [known.get(id(each), each.requires_grad) for each in snapshot.tensors]
        return self._replace(snapshot=snapshot, requires=requires)

    def trainable(self) -> list[Tensor]:
        """Return the tensors that required gradients."""
        return [*compress(self.snapshot.tensors, self.requires or ())]

    def equals(self, other: ModuleState) -> bool:
        """Return whether a pass gives the same in both."""
        return self.snapshot is other.snapshot and self.training is other.training


@dataclass(slots=True)
class LaneModule:
    """A module as one lane runs it in one pass."""

    replica: Replica
    tensors: Substitutions
    changes: AttributeMap
    state: ModuleState
    source: Copies | None
    writes_back_to: ModuleSnapshot | None
    """Where updates of buffers survive, on lane 0."""
    carried: Carried
    lane: int
    written: WrittenParameters
    watch: ParameterWatch
    """Of the module's own parameters, for a lane that has them and need not look closely."""
    own: Set[int]
    """The `id` of each parameter whose memory no other lane has."""
    looks_closely: bool
    """Whether none of this kind was looked at before, or some have written into parameters."""
    memory: Sequence[torch.UntypedStorage] = ()
    """Of `tensors` at first: a forward may give them other memory before a device has read this."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the replica's forward; only ever on the lane's own thread."""
        tensors = self.tensors if self.source is None else self.source.up_to_date(self.tensors)
        required, now = self.state.requires, self.state.snapshot.tensors
        if required is not None and [*map(_requires_grad, now)] != required:
            tensors = _as_of_the_call(now, required, tensors)
        replica, snapshot = self.replica, self.writes_back_to
        replica.bind(tensors, self.changes, self.state.training)
        is_recorded = torch.is_grad_enabled()
        watch = self.watch
        if self.looks_closely or self.source is not None:
            parameters = [tensors[id(each)] for each in self.state.snapshot.parameters]
            watch = ParameterWatch(parameters, closely=self.looks_closely)
        reads_values = self.looks_closely or (
            bool(self.written.uncounted) and self.state.kind in self.written.uncounted
        )
        try:
            before = watch.look()
            tags = None
            if reads_values or snapshot is not None:
                tags = replica.tags(reads_values=reads_values)
            output = replica.module(*args, **kwargs)
            written = watch.written(before)
            if tags and reads_values and replica.wrote_uncounted(tags):
                self.written.uncounted.add(self.state.kind)
            survivors = replica.survivors(snapshot, tags, written)
            if written or self.looks_closely:
                self._note(written)
            # Without a gradient no backward comes to run parts of the forward again.
            is_recorded = is_recorded and (type(output) is not Tensor or output.requires_grad)
            if survivors is not None:
                self.carried.apply(survivors, self.state.training[0])
        finally:
            replica.end(is_recorded=is_recorded)
        return output

    def _note(self, positions: Sequence[int]) -> None:
        """Have later passes know which parameters the forward wrote.

        Raises:
            ParameterWrittenError: other lanes may have read or written the same memory.
        """
        self.written.add(self.state.kind, positions)
        if positions and self.source is not None and self.lane > 0:
            self.source.forget()
        self.written.check_apart(positions, self.own, self.state.snapshot)


def _as_of_the_call(
    originals: Sequence[Tensor], requires: Sequence[bool], tensors: Substitutions
) -> Substitutions:
    """Return substitutions where those that required gradients at the call do so, and no others."""
    flipped = [
        (each, required)
        for each, required in zip(originals, requires, strict=True)
        if each.requires_grad != required and tensors[id(each)] is each
    ]
    # Nothing takes the gradients of a leaf whose owner has frozen it meanwhile.
    alike = [each.detach().requires_grad_(required) for each, required in flipped]
    return {**tensors, **substitutions([each for each, _ in flipped], alike)}
