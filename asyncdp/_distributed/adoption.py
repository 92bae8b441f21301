"""One module in several processes: compared, then given the values of one of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._replicas.copies import DEFAULT_BUCKET_BYTES, buckets
from ..errors import ProcessMismatchError
from .agreement import first_difference
from .digest import digest_of
from .layout import strides_of
from .transport import Transport


class Standing(NamedTuple):
    """How a process comes to a group.

    Attributes:
        is_back: whether its engine is there already, and joins again.
        num_done: steps that it has taken with others.
        is_diverged: whether it has changed part of its state in a step that failed.
    """

    is_back: bool = False
    num_done: int = 0
    is_diverged: bool = False


def compare(
    transport: Transport, module: nn.Module, others: Sequence[Any] = (), standing: Standing | None = None
) -> tuple[int, int]:
    """Compare what all processes bring; block until every process has come here.

    Args:
        transport: between them.
        module: what they train.
        others: an optimizer, a scheduler, a scaler; None where a process has none.
        standing: how this process comes.

    Returns:
        The process whose state is to go to all, and how many steps it has taken.

    Raises:
        ProcessMismatchError: something differs; on every process.
    """
    standing = standing or Standing()
    kinds = [f"state of {type(each).__qualname__}" for each in others if each is not None]
    way = "an engine that rejoins" if standing.is_back else "an engine that is made"
    text = "\n".join([way, *kinds, *_lines(module)])
    answers = transport.exchange([digest_of(text), standing.num_done, standing.is_diverged])
    if len({digest for digest, _, _ in answers}) > 1:
        difference = first_difference(transport.exchange_texts(text))
        raise ProcessMismatchError(difference.rank, difference.cause)
    counts = [-1 if is_diverged else num_done for _, num_done, is_diverged in answers]
    if max(counts) < 0:
        counts = [num_done for _, num_done, _ in answers]
    return counts.index(max(counts)), max(counts)


def adopt(transport: Transport, module: nn.Module, others: Sequence[Any], owner: int) -> None:
    """Give the state of the process `owner` to all, after `compare`.

    Raises:
        ProcessMismatchError: a process could not load it; on every process.
    """
    share_tensors(transport, [*module.parameters(), *module.buffers()], owner)
    failure = ""
    for each in others:
        if each is not None:
            state = _share_object(transport, each.state_dict() if transport.rank == owner else None, owner)
            try:
                if transport.rank != owner:
                    each.load_state_dict(state)
            except Exception as error:
                failure = f"it cannot load the state of {type(each).__qualname__}: {error}"
    failures = transport.exchange_texts(failure)
    rank = next((place for place, text in enumerate(failures) if text), None)
    if rank is not None:
        raise ProcessMismatchError(rank, failures[rank])


def _share_object(transport: Transport, value: Any, owner: int) -> Any:
    file = io.BytesIO()
    if transport.rank == owner:
        torch.save(value, file)
    data = bytearray(file.getvalue())
    [length] = transport.exchange([len(data)])[owner]
    flat = torch.frombuffer(data or bytearray(length), dtype=torch.uint8)
    flat = transport.share(flat, owner)
    # What the processes of one job send each other is as much to be trusted as their program.
    return torch.load(io.BytesIO(flat.numpy().tobytes()), map_location="cpu", weights_only=False)


def share_tensors(transport: Transport, tensors: Sequence[Tensor], owner: int) -> None:
    """Give the values of one process's tensors to those of all, each tensor once."""
    distinct = [*{id(tensor): tensor for tensor in tensors}.values()]
    with torch.inference_mode(False), torch.no_grad():
        for bucket in buckets(distinct, DEFAULT_BUCKET_BYTES):
            values = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in bucket]
            flat = transport.share(torch.cat(values), owner)
            if transport.rank == owner:
                continue
            for tensor, part in zip(bucket, flat.split([each.numel() for each in values]), strict=True):
                # A copy, as a part of the whole need not begin where a number of that dtype may.
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _lines(module: nn.Module) -> list[str]:
    """Describe every tensor of a module, and which names share one."""
    first: dict[int, str] = {}
    lines = []
    named: list[tuple[str, Any]] = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if id(tensor) in first:
            lines.append(f"{name}, tied to {first[id(tensor)]}")
            continue
        first[id(tensor)] = name
        lines.append(describe(name, tensor))
    return lines


def describe(name: str, tensor: Tensor) -> str:
    """Return a line that says what a tensor is like, apart from its values."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {list(tensor.shape)} {kind}, strides {list(strides_of(tensor))}"
