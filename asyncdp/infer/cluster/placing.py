"""Where actors go: one per node with all that the node has, or as many as were asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import JobUsageError

_CPU, _GPU = "CPU", "GPU"


class Node(NamedTuple):
    """A node of the cluster.

    Attributes:
        id: Ray's own.
        name: for people.
        resources: how much there is of each, in all.
    """

    id: str
    name: str
    resources: Mapping[str, float]


class Slot(NamedTuple):
    """A place for an actor."""

    node: Node
    resources: Mapping[str, float]


def place(
    nodes: Sequence[Node],
    *,
    num_actors: int | None = None,
    resources: Mapping[str, float] | None = None,
    on_gpus: bool = True,
) -> list[Slot]:
    """Choose nodes, and what each actor takes there.

    Args:
        nodes: those that live.
        num_actors: how many, over all nodes; None for one per node, or as many as `resources` leave room for.
        resources: what each actor takes; None for an equal share of its node's processors and GPUs.
        on_gpus: whether GPUs are to be used: then nodes without are left out where others have some.

    Returns:
        As many places as can be had.
    """
    usable = [node for node in nodes if node.resources.get(_CPU) or node.resources.get(_GPU)]
    with_gpus = [node for node in usable if node.resources.get(_GPU)]
    usable = with_gpus if on_gpus and with_gpus and not resources else usable
    if resources:
        room = {node.id: _room(node, resources) for node in usable}
        turns = range(max(room.values(), default=0))
        slots = [Slot(node, resources) for turn in turns for node in usable if room[node.id] > turn]
        return slots[:num_actors]
    wanted = len(usable) if num_actors is None else num_actors
    shares = {node.id: len(range(index, wanted, len(usable))) for index, node in enumerate(usable)}
    names = (_CPU, _GPU) if on_gpus else (_CPU,)
    return [
        Slot(node, _share(node, names, shares[node.id])) for node in usable for _ in range(shares[node.id])
    ]


def parse_resources(text: str | None) -> dict[str, float] | None:
    """Read what each actor takes.

    Raises:
        JobUsageError: it is no JSON object of positive numbers.
    """
    if text is None:
        return None
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = None
    is_number = isinstance(found, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        for value in found.values()
    )
    if not found or not is_number:
        raise JobUsageError(
            f"--ray-resources {text} are no resources", 'Write them as JSON: {"CPU": 8, "GPU": 1}.'
        )
    return dict(found)


def _room(node: Node, resources: Mapping[str, float]) -> int:
    return min(int(node.resources.get(name, 0) / amount + 1e-9) for name, amount in resources.items())


def _share(node: Node, names: Sequence[str], num_actors: int) -> dict[str, float]:
    """Return an equal share; of what is more than one, Ray gives whole ones only."""
    shares = {name: node.resources.get(name, 0) / num_actors for name in names}
    return {name: int(share) if share > 1 else share for name, share in shares.items() if share}
