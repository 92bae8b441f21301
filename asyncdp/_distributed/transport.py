"""The collectives of one engine, over connections of its own.

They are made beside the user's process group, of the same processes: collectives pair by order, and the
user's own, called on another thread, must not come in between.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._checks import shown
from .._torch_private import store_of_group, timeout_of_group
from ..errors import ProcessGroupError
from .waits import wait_done

dist: Any = torch.distributed  # exports part of what it documents


def group_of(process_group: Any) -> Any:
    """Return the process group that a user means.

    Raises:
        ProcessGroupError: it is none.
    """
    if not dist.is_available():
        raise ProcessGroupError("needs torch.distributed, which this build of torch lacks")
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ProcessGroupError(f"must be one dimension of a mesh, but this one has {process_group.ndim}")
        process_group = process_group.get_group()
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ProcessGroupError("does not contain this process")
    if not isinstance(process_group, dist.ProcessGroup):
        raise ProcessGroupError(f"must be a ProcessGroup or a DeviceMesh, but got {shown(process_group)}")
    return process_group


class Notices:
    """What one process has to say to the others at no particular time, each under a name of its own.

    Args:
        store: of torch.distributed.
        timeout: seconds to wait for one.
    """

    def __init__(self, store: Any, timeout: float) -> None:
        self._store = store
        self.timeout = timeout

    def give(self, name: str, text: str) -> None:
        """Say something."""
        self._store.set(name, text)

    def look(self, name: str) -> str | None:
        """Return what was said, None if nothing yet."""
        return self._store.get(name).decode() if self._store.check([name]) else None


class Transport:
    """Connections between the processes of a group. Used by one thread at a time; calls block.

    Numbers, texts and CPU tensors go over gloo; CUDA tensors over NCCL where it is there, else through the
    CPU. Whoever drops the last reference closes the connections, which the other processes notice.

    Args:
        process_group: which processes, and how long a collective may take.

    Attributes:
        rank: of this process in the group.
        size: how many processes there are.
        notices: what one process has to say to the others at no particular time.
    """

    def __init__(self, process_group: Any) -> None:
        self.rank, self.size = process_group.rank(), process_group.size()
        timeout = timeout_of_group(process_group)
        try:
            store = store_of_group(process_group)
        except (KeyError, ValueError):
            raise ProcessGroupError("was destroyed, or not made by torch.distributed") from None
        try:
            self._connect(process_group, store, timeout)
        except RuntimeError as error:
            raise ProcessGroupError(
                f"has processes that did not come within {timeout.total_seconds():g} s, or are gone",
                "Make the engine, or call rejoin, on every process of the group, in the same order.",
            ) from error

    def _connect(self, process_group: Any, store: Any, timeout: timedelta) -> None:
        # By a collective of the group's own: in the store there may be all that earlier processes have left,
        # as torchrun keeps one for all of its restarts.
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, dist.get_global_rank(process_group, 0), process_group)
        store = dist.PrefixStore(f"asyncdp/{name[0]}", store)
        self._gloo: Any = dist.ProcessGroupGloo(
            dist.PrefixStore("gloo", store), self.rank, self.size, timeout=timeout
        )
        self._nccl = self._make_nccl(store, timeout)
        self.notices = Notices(dist.PrefixStore("notices", store), timeout.total_seconds())

    def _make_nccl(self, store: Any, timeout: timedelta) -> Any:
        if not (torch.cuda.is_available() and dist.is_nccl_available()):
            return None
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), self.rank, self.size, options)

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Give signed 64-bit numbers to all processes, as many as they give; return those of each."""
        table = torch.zeros(self.size, len(numbers), dtype=torch.int64)
        table[self.rank] = torch.tensor(numbers, dtype=torch.int64)
        wait_done(self._gloo.allreduce([table]))
        return table.tolist()

    def exchange_texts(self, text: str) -> list[str]:
        """Give a text to all processes; return the text of each."""
        own = text.encode()
        lengths = [length for (length,) in self.exchange([len(own)])]
        table = torch.zeros(self.size, max(lengths), dtype=torch.uint8)
        if own:
            table[self.rank, : len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        if table.numel():
            wait_done(self._gloo.allreduce([table]))
        return [
            bytes(row[:length].tolist()).decode(errors="replace")
            for row, length in zip(table, lengths, strict=True)
        ]

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to sum a contiguous tensor over all processes.

        Args:
            tensor: may be written to.

        Returns:
            A function that waits for the sum.
        """
        group, device = self._gloo, tensor.device
        if device.type == "cuda" and self._nccl is not None:
            group = self._nccl
        elif device.type != "cpu":
            tensor = tensor.cpu()
        work = group.allreduce([tensor])

        def wait() -> Tensor:
            if group is self._gloo:
                wait_done(work)
            else:
                work.wait()
                torch.cuda.current_stream(device).synchronize()
            return tensor.to(device)

        return wait

    def share(self, tensor: Tensor, owner: int) -> Tensor:
        """Give a contiguous tensor on the CPU to all processes; the others' are written to."""
        options = dist.BroadcastOptions()
        options.rootRank = owner
        wait_done(self._gloo.broadcast([tensor], options))
        return tensor
