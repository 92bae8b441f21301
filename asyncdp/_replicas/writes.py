"""Forwards that write into their own parameters: found, and kept from the other lanes that share these.

The first pass of each kind looks closely, also for what no version counts, and its lanes share no memory
but the module's own, which the first lane has. Later passes watch versions only.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_private import version_of
from ..errors import ParameterWrittenError
from .containers import is_same
from .copies import checksum_of
from .snapshot import ModuleSnapshot

# Copies of more than this for one pass are not worth what they guard against.
_MAX_COPIED_BYTES = 2**30
# Reading one version takes 0.04 to 0.13 us. Of more parameters each pass watches another part.
_MAX_WATCHED = 64
_MAX_SAMPLE = 4096

_passes = itertools.count()


class ParameterWatch:
    """Tells which parameters are written while a forward runs.

    Args:
        parameters: what to watch.
        closely: watch all of them, and their values too: no version counts a write by way of `.data`.
    """

    __slots__ = ("_closely", "_first", "_samples", "_step", "_versions", "_watched")

    def __init__(self, parameters: Sequence[Tensor], *, closely: bool) -> None:
        self._closely = closely
        self._step = 1 if closely else -(-len(parameters) // _MAX_WATCHED) or 1
        self._first = next(_passes) % self._step
        self._watched = parameters if self._step == 1 else parameters[self._first :: self._step]
        self._versions = _versions(self._watched)
        self._samples = [*map(_sample, self._watched)] if closely else []

    def written(self) -> list[int]:
        """Return the positions of those that were written since."""
        versions = _versions(self._watched)
        samples = [*map(_sample, self._watched)] if self._closely else []
        if versions == self._versions and samples == self._samples:
            return []
        return [
            self._first + self._step * place
            for place, version in enumerate(versions)
            if version != self._versions[place] or (samples and samples[place] != self._samples[place])
        ]


def _versions(tensors: Sequence[Tensor]) -> list[Any]:
    try:
        return [*map(version_of, tensors)]
    except RuntimeError:  # an inference tensor, which counts none
        return [None if tensor.is_inference() else version_of(tensor) for tensor in tensors]


def _sample(tensor: Tensor) -> int:
    # Other devices' values are not worth waiting for; of subclasses nobody knows where their values are.
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_quantized:
        return 0
    if type(tensor) not in (Tensor, nn.Parameter):
        return 0
    with torch.no_grad():
        flat = tensor.detach().reshape(-1)
        return checksum_of(flat[:: len(flat) // _MAX_SAMPLE + 1])


class WrittenParameters:
    """What is known of a module's habit to write into its parameters; forgotten once it has others.

    Args:
        devices: one per lane.

    Attributes:
        parameters: all that the module has.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self.parameters: list[Tensor] = []
        self._known: set[int] = set()  # positions in `parameters`
        self._seen: set[Hashable] = set()

    def __bool__(self) -> bool:
        return bool(self._known)

    def needs_close_look(self, kind: Hashable) -> bool:
        """Return whether a pass is to be watched closely: the first of its kind, or all where some write."""
        return bool(self._known) or kind not in self._seen

    def add(self, kind: Hashable, positions: Collection[int]) -> None:
        """Remember which parameters the forward of a pass has written, none of them for most."""
        self._seen.add(kind)
        self._known.update(positions)

    def own(self, snapshot: ModuleSnapshot, kind: Hashable, lanes: Sequence[int]) -> Set[int]:
        """Return the `id` of each parameter of which no two lanes may share the memory in a pass.

        Args:
            snapshot: of the module.
            kind: of the pass.
            lanes: the positions of those that run it.
        """
        if not is_same(self.parameters, snapshot.parameters):
            self.parameters = snapshot.parameters
            self._known, self._seen = set(), set()
        if kind not in self._seen:
            shared = [each for each in self.parameters if self.is_shared(each)]
            num_bytes = sum(each.numel() * each.element_size() for each in shared)
            if num_bytes * sum(lane > 0 for lane in lanes) <= _MAX_COPIED_BYTES:
                return {*map(id, shared)}
        return {id(self.parameters[position]) for position in self._known}

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
