"""Engines inside of Ray: an actor for programs of one's own, and a class for Ray Data.

It is imported on demand, as `asyncdp.ray`, and needs the extra `asyncdp[ray]`.
"""

import importlib.util

from ..errors import MissingExtraError

for _package in ("ray", "pandas"):
    if importlib.util.find_spec(_package) is None:
        raise MissingExtraError("asyncdp.ray", _package, "ray")

from .actor import ActorStatistics, InferenceActor  # noqa: E402  the error names the extra
from .batches import map_batches_class  # noqa: E402

__all__ = ["ActorStatistics", "InferenceActor", "map_batches_class"]
