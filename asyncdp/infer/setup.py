"""From options to what a job works with: functions and devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from .._devices import parse_devices
from ..errors import JobUsageError
from .model.names import load_name
from .options import InferOptions
from .readers import decode_image
from .steps import EachValue, Steps, default_collate, image_to_tensor, length_of, same


def make_steps(options: InferOptions, input_format: str) -> Steps:
    """Puts together the functions around the model.

    Raises:
        JobUsageError: When a function that was named cannot be imported.
    """
    if options.task == "embed":
        from .model.embed import embed_steps

        steps = embed_steps(Path(options.model))
    else:
        prepare = image_to_tensor if input_format == "images" else same
        steps = Steps(EachValue(prepare), default_collate, same, length_of)
    own = {name: _function(options, name) for name in ("preprocess", "collate", "postprocess")}
    if own["preprocess"]:
        inner = EachValue(own["preprocess"])
        own["preprocess"] = Chained(inner, steps.preprocess) if options.task == "embed" else inner
    steps = dataclasses.replace(steps, **{name: function for name, function in own.items() if function})
    if input_format == "images":
        steps = dataclasses.replace(steps, preprocess=Chained(EachValue(decode_image), steps.preprocess))
    return steps


@dataclasses.dataclass(frozen=True)
class Chained:
    """Runs one function of many values after another."""

    first: Any
    then: Any

    def __call__(self, values: list[Any]) -> list[Any]:
        """Applies both to the values."""
        chained: list[Any] = self.then(self.first(values))
        return chained


def _function(options: InferOptions, name: str) -> Any:
    spec = getattr(options, name)
    if spec is None:
        return None
    function = load_name(spec, f"--{name}")
    if not callable(function):
        raise JobUsageError(f"--{name} {spec} is no function", "Name a function as package.module:name.")
    return function


def find_devices(spec: str | None) -> list[torch.device]:
    """Returns the device of every lane.

    Raises:
        JobUsageError: When this machine has no such device.
    """
    try:
        return parse_devices(spec)
    except (ValueError, RuntimeError) as error:
        cause = str(error).rstrip(".")
        raise JobUsageError(f"--devices: {cause}", "See `asyncdp devices` for what there is.") from error
