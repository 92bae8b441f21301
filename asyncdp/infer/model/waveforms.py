"""Sounds to what a model of transformers hears, by the folder's own processor."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import MissingExtraError, ModelLoadError
from ..readers.audio import decode_audio
from .folders import import_transformers
from .names import brief

Piece = Mapping[str, Any]
"""What the model gets of a stretch of sound, tensors [1, ...], and its `stride` where stretches overlap."""


class Hear:
    """Sounds -> pieces, as transformers' pipeline of speech recognition makes them.

    Args:
        extractor: of the folder; it says which rate the model hears.
        chunk_samples: samples of the stretches that a sound is cut into, which overlap by a third of
            them; None hears a sound as a whole.
        align_to: samples that the model makes one output of.
    """

    def __init__(self, extractor: Any, chunk_samples: int | None, align_to: int) -> None:
        self._extractor = extractor
        self._chunk = chunk_samples
        self._align_to = align_to

    def __call__(self, values: Sequence[Any]) -> list[list[Piece]]:
        """Process all sounds, each by itself."""
        return [self._pieces(self._samples(value)) for value in values]

    def _samples(self, value: Any) -> np.ndarray[Any, Any]:
        """Return the samples of one channel in the rate that the model hears."""
        sound = as_sound(value)
        rate = self._extractor.sampling_rate
        if sound["sampling_rate"] == rate:
            return sound["array"]  # type: ignore[no-any-return]
        import soxr

        heard: np.ndarray[Any, Any] = soxr.resample(sound["array"], sound["sampling_rate"], rate)
        if not len(heard):
            raise ValueError(f"the sound is too short: {len(sound['array'])} samples")
        return heard

    def _pieces(self, samples: np.ndarray[Any, Any]) -> list[Piece]:
        if self._chunk is not None:
            module = importlib.import_module("transformers.pipelines.automatic_speech_recognition")
            stride = round(self._chunk / 6 / self._align_to) * self._align_to
            pieces = module.chunk_iter(samples, self._extractor, self._chunk, stride, stride)
            return [_as_piece(piece) for piece in pieces]
        # Whisper's extractor cuts what is longer than its window, unless it is told not to.
        whole = {"truncation": False, "padding": "longest"}
        window = getattr(self._extractor, "n_samples", None)
        settings = whole if window is not None and len(samples) > window else {}
        settings |= {"sampling_rate": self._extractor.sampling_rate, "return_tensors": "pt"}
        return [_as_piece(self._extractor(samples, return_attention_mask=True, **settings))]


def as_sound(value: Any) -> Mapping[str, Any]:
    """Return a sound that was read, or that is in a column, as `array` [samples] and `sampling_rate` in Hz.

    Args:
        value: what `decode_audio` returns; the bytes of a file; a mapping with them as `bytes`, as `datasets`
            stores sounds; or a mapping with numbers as `array` and their `sampling_rate`.

    Raises:
        TypeError: it is none of these.
        ValueError: it cannot be heard.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if isinstance(value, bytes):
        return decode_audio(io.BytesIO(value))
    if isinstance(value, Mapping) and {"array", "sampling_rate"} <= value.keys():
        samples = np.asarray(value["array"], np.float32)
        if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
            raise ValueError(f"the array of a sound must be finite numbers [samples], got {samples.shape}")
        return {"array": samples, "sampling_rate": _checked_rate(value["sampling_rate"])}
    raise TypeError(f"expected a sound file or its bytes, got {value!r:.80}; choose them with --column")


def _checked_rate(rate: Any) -> int:
    if isinstance(rate, bool) or not isinstance(rate, int) or rate < 1:
        raise ValueError(f"the sampling_rate of a sound must be a whole number of Hz, got {rate!r:.80}")
    return rate


def _as_piece(inputs: Mapping[str, Any]) -> Piece:
    return {name: value for name, value in inputs.items() if name != "is_last"}


def pieces_by_shape(items: Sequence[Sequence[Piece]]) -> dict[str, Any]:
    """Put the pieces of a batch that are of one shape together: padding would change what is heard.

    Returns:
        `groups`, each a dict of tensors [pieces of one shape, ...], and `order`: for each piece its place
        among all pieces of the groups.
    """
    pieces = [piece for item in items for piece in item]
    by_shape: dict[Any, list[int]] = {}
    for number, piece in enumerate(pieces):
        by_shape.setdefault(tuple(_main(piece).shape), []).append(number)
    groups = [
        {
            name: torch.cat([pieces[number][name] for number in numbers])
            for name, value in pieces[numbers[0]].items()
            if isinstance(value, torch.Tensor)
        }
        for numbers in by_shape.values()
    ]
    places = [number for numbers in by_shape.values() for number in numbers]
    return {"groups": groups, "order": torch.tensor(places).argsort()}


def length_heard(item: Sequence[Piece]) -> int:
    """Return how many numbers an item has, by which batches are put together."""
    return sum(_main(piece).numel() for piece in item)


def _main(piece: Piece) -> torch.Tensor:
    inputs = (value for name, value in piece.items() if name != "attention_mask")
    return next(value for value in inputs if isinstance(value, torch.Tensor))


def load_feature_extractor(folder: Path) -> Any:
    """Load what makes a model's inputs of sounds.

    Raises:
        MissingExtraError: a library that reads or resamples sounds is not installed.
        ModelLoadError: the folder has none.
    """
    for package in ("soundfile", "soxr"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("--task transcribe", package, "audio")
    try:
        return import_transformers().AutoFeatureExtractor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelLoadError(
            f"The folder {folder} holds no feature extractor of sounds: {brief(error)}",
            "Copy preprocessor_config.json of the model into it.",
        ) from error
