"""From options to the functions and devices of a job."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from .._devices import parse_devices
from ..errors import JobUsageError
from .dtypes import InputDtypes, parse_dtypes
from .model.models import LoadedModel
from .model.names import load_name
from .options import InferOptions
from .readers import decode_audio, decode_image
from .steps import EachValue, Stack, Steps, image_to_tensor, length_of, same


def make_steps(options: InferOptions, input_format: str, model: LoadedModel) -> Steps:
    """Put together the functions around the model.

    Args:
        options: names of the functions.
        input_format: format of the input files.
        model: says what it expects.

    Raises:
        JobUsageError: a function that was named cannot be imported.
    """
    if model.steps is not None:
        steps = model.steps
    else:
        dtypes = InputDtypes(parse_dtypes(options.input_dtype), model.input_dtypes)
        prepare = image_to_tensor if input_format == "images" else same
        steps = Steps(EachValue(prepare), Stack(dtypes), same, length_of)
    named = {name: getattr(options, name) for name in ("preprocess", "collate", "postprocess")}
    own = {name: _load_function(spec, f"--{name}") for name, spec in named.items() if spec is not None}
    if "preprocess" in own:
        inner = EachValue(own["preprocess"])
        own["preprocess"] = _Chained(inner, steps.preprocess) if model.steps else inner
    # A function of one's own gets the items alone.
    steps = dataclasses.replace(steps, takes_positions=steps.takes_positions and "collate" not in own, **own)
    decoders: dict[str, Callable[[Any], Any]] = {
        "images": functools.partial(decode_image, first_frame=options.first_frame),
        "audio": decode_audio,
    }
    if input_format in decoders:
        decode = EachValue(decoders[input_format])
        steps = dataclasses.replace(steps, preprocess=_Chained(decode, steps.preprocess))
    return steps


@dataclasses.dataclass(frozen=True)
class _Chained:
    """One function of many values after another; worker processes can import it."""

    first: Any
    then: Any

    def __call__(self, values: Any) -> Any:
        """Apply both to the values."""
        return self.then(self.first(values))


def _load_function(spec: str, flag: str) -> Any:
    function = load_name(spec, flag)
    if not callable(function):
        raise JobUsageError(f"{flag} {spec} is no function", "Name a function as package.module:name.")
    return function


def find_devices(spec: str | None) -> list[torch.device]:
    """Return the device of every lane.

    Raises:
        JobUsageError: this machine has no such device.
    """
    try:
        return parse_devices(spec)
    except (ValueError, RuntimeError) as error:
        cause = str(error).rstrip(".")
        raise JobUsageError(f"--devices: {cause}", "See `asyncdp devices` for what there is.") from error
