"""Forwards that write into their own parameters: found, and kept from the other lanes that share these.

The first pass of each kind looks closely, also for what no version counts, and its lanes share no memory
but the module's own, which the first lane has. Later passes watch versions only.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from .._torch_private import version_of
from ..errors import ParameterWrittenError
from .checksums import close_look
from .containers import is_same
from .snapshot import ModuleSnapshot

# Copies of more than this for one pass are not worth what they guard against.
_MAX_COPIED_BYTES = 2**30
# Reading one version takes 0.04 to 0.13 us. Of more parameters each pass watches another part.
_MAX_WATCHED = 64

_passes = itertools.count()


class ParameterWatch:
    """Tells which parameters are written while forwards run, any number of them at a time.

    Args:
        parameters: what to watch.
        closely: watch all of them, and their values too: no version counts a write by way of `.data`.
    """

    __slots__ = ("_parts", "_state_of", "closely")

    def __init__(self, parameters: Sequence[Tensor], *, closely: bool) -> None:
        self.closely = closely
        self._state_of = close_look if closely else version_of
        # An inference tensor counts no versions.
        places = [place for place, each in enumerate(parameters) if closely or not each.is_inference()]
        step = 1 if closely else -(-len(places) // _MAX_WATCHED) or 1
        chosen = [places[first::step] for first in range(step)]
        self._parts = [(each, [parameters[place] for place in each]) for each in chosen]

    def look(self) -> Look:
        """Return how parameters are before a forward, for `written`."""
        part = next(_passes) % len(self._parts)
        return part, [*map(self._state_of, self._parts[part][1])]

    def written(self, before: Look) -> list[int]:
        """Return the positions of those that were written since."""
        part, states = before
        places, watched = self._parts[part]
        now = [*map(self._state_of, watched)]
        if now == states:
            return []
        return [place for place, old, new in zip(places, states, now, strict=True) if old != new]


Look = tuple[int, list[Any]]
"""Which part of the parameters was looked at, and what they were like."""


class WrittenParameters:
    """What is known of a module's habit to write into its own tensors; forgotten once it has others.

    Args:
        devices: one per lane.

    Attributes:
        parameters: all that the module has.
        known: the positions of those that forwards have written.
        watch: of all, but not closely.
        uncounted: the kinds of passes that write into buffers, or tensors that are neither, without a
            version that counts it, but for buffers in train mode, where that is usual.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self.parameters: list[Tensor] = []
        self.known: set[int] = set()
        self.watch = ParameterWatch((), closely=False)
        self.uncounted: set[Hashable] = set()
        self._seen: set[Hashable] = set()

    def follow(self, snapshot: ModuleSnapshot) -> None:
        """Forget everything if the module has other parameters."""
        if self.parameters is not snapshot.parameters:
            if not is_same(self.parameters, snapshot.parameters):
                self.known, self.uncounted, self._seen = set(), set(), set()
            self.parameters = snapshot.parameters
            self.watch = ParameterWatch(self.parameters, closely=False)

    def watch_of(self, snapshot: ModuleSnapshot, kind: Hashable) -> ParameterWatch:
        """Return what watches the module's own parameters in a pass, closely if need be."""
        self.follow(snapshot)
        return ParameterWatch(self.parameters, closely=True) if self.needs_close_look(kind) else self.watch

    def needs_close_look(self, kind: Hashable) -> bool:
        """Return whether a pass is to be watched closely: the first of its kind, or all where some write."""
        return bool(self.known) or kind not in self._seen

    def reads_values(self, kind: Hashable) -> bool:
        """Return whether a pass is to find also what no version counts of all that is no parameter."""
        return kind in self.uncounted or self.needs_close_look(kind)

    def add(self, kind: Hashable, positions: Collection[int]) -> None:
        """Remember which parameters the forward of a pass has written, none of them for most."""
        self._seen.add(kind)
        self.known.update(positions)

    def own(self, snapshot: ModuleSnapshot, kind: Hashable, lanes: Sequence[int]) -> Set[int]:
        """Return the `id` of each parameter of which no two lanes may share the memory in a pass.

        Args:
            snapshot: of the module.
            kind: of the pass.
            lanes: the positions of those that run it.
        """
        self.follow(snapshot)
        if kind not in self._seen:
            shared = [each for each in self.parameters if self.is_shared(each)]
            num_bytes = sum(each.numel() * each.element_size() for each in shared)
            if num_bytes * sum(lane > 0 for lane in lanes) <= _MAX_COPIED_BYTES:
                return {*map(id, shared)}
        return {id(self.parameters[position]) for position in self.known}

    def is_shared(self, parameter: Tensor) -> bool:
        """Return whether several lanes would have a parameter itself."""
        return self._devices.count(parameter.device) > 1

    def check_apart(self, positions: Collection[int], own: Set[int], snapshot: ModuleSnapshot) -> None:
        """Refuse what lanes have written that share it.

        Args:
            positions: of the parameters that were written.
            own: as `own` returned it for the pass.
            snapshot: of the module.

        Raises:
            ParameterWrittenError: other lanes may have read or written the same memory.
        """
        for position in positions:
            parameter = self.parameters[position]
            if self.is_shared(parameter) and id(parameter) not in own:
                named = snapshot.modules[0].named_parameters()
                name = next((name for name, each in named if each is parameter), "parameter")
                raise ParameterWrittenError(name)
