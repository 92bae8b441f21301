"""Entries written and read by torch.distributed.checkpoint, in this process alone.

Its `save` and `load` would be one call each, but warn wherever no process group is initialised, and cannot be
called off. Importing this module takes most of a second: import it on a thread.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .entries import Entries, Kind, Path_, Stop, kind_of

METADATA = ".metadata"
"""The file that makes a folder a checkpoint."""


_BOXED = "boxed_tensor"


def _storable(value: Any) -> Any:
    """Box a tensor that the files cannot have as one: sparse, quantized, of a subclass."""
    is_to_box = isinstance(value, torch.Tensor) and kind_of(value) is None
    return SimpleNamespace(**{_BOXED: value}) if is_to_box else value


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, entries: Entries, stop: Stop) -> None:
        super().__init__()
        self._entries = entries
        self._stop = stop

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        # As they are: what this class would flatten further would come back without its tuples.
        self.state_dict = {".".join(path): _storable(value) for path, value in self._entries.items()}
        self.mappings = {".".join(path): path for path in self._entries}
        self.is_coordinator = is_coordinator

    def resolve_data(self, write_item: Any) -> Any:
        self._stop.check()
        return super().resolve_data(write_item)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, stop: Stop) -> None:
        super().__init__(flatten_state_dict=False)
        self._stop = stop

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self._stop.check()
        loaded = torch.load(value, map_location="cpu", weights_only=False)
        is_boxed = type(loaded) is SimpleNamespace and loaded.__dict__.keys() == {_BOXED}
        self.state_dict[read_item.dest_index.fqn] = getattr(loaded, _BOXED) if is_boxed else loaded

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        self._stop.check()
        return super().resolve_tensor(read_item)  # type: ignore[no-any-return]


def write(folder: Path, entries: Entries, prefix: str, stop: Stop) -> None:
    """Write entries into an empty folder; the names of all files but one begin with a prefix."""
    planner = _SavePlanner(entries, stop)
    writer = FileSystemWriter(folder)
    planner.set_up_planner({}, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    results = writer.write_data(plan, planner).wait()
    for file in folder.iterdir():
        file.rename(folder / (prefix + file.name))
    writer.finish(metadata, [[_renamed(result, prefix) for result in results]])


def _renamed(result: Any, prefix: str) -> Any:
    place = result.storage_data
    place = dataclasses.replace(place, relative_path=prefix + place.relative_path)
    return dataclasses.replace(result, storage_data=place)


class Reader:
    """What a folder holds.

    Attributes:
        kinds: the kind of every entry.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        self._metadata = self._reader.read_metadata()
        paths: Mapping[str, Path_] = self._metadata.planner_data
        self.kinds: dict[Path_, Kind | None] = {
            tuple(paths[name]): Kind(each.size, each.properties.dtype)
            if isinstance(each, TensorStorageMetadata)
            else None
            for name, each in self._metadata.state_dict_metadata.items()
        }

    def read(self, paths: Collection[Path_], stop: Stop) -> Entries:
        """Read some entries, tensors into memory of their own on the CPU."""
        state: dict[str, Any] = {}
        for path in paths:
            kind = self.kinds[path]
            state[".".join(path)] = None if kind is None else torch.empty(kind.shape, dtype=kind.dtype)
        planner = _LoadPlanner(stop)
        planner.set_up_planner(state, self._metadata, is_coordinator=True)
        self._reader.set_up_storage_reader(self._metadata, True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        plans = self._reader.prepare_global_plan(planner.create_global_plan([plan]))
        self._reader.read_data(planner.finish_plan(plans[0]), planner).wait()
        return {path: planner.state_dict[".".join(path)] for path in paths}
