"""Vectors in fewer bits, as `quantize_embeddings` of sentence-transformers makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import JobUsageError

_OFFSET = 128


class Quantize:
    """Quantises the column `embedding` of a batch.

    Args:
        precision: int8 or uint8, a byte for each entry; binary or ubinary, a bit for each.
        ranges: least and greatest value of each entry [2, width], for bytes.
    """

    def __init__(self, precision: str, ranges: np.ndarray[Any, Any] | None = None) -> None:
        self._precision = precision
        self._ranges = ranges

    def __call__(self, output: dict[str, Any], items: Sequence[Any]) -> dict[str, Any]:
        """Return the output with its vectors quantised: [batch, width] or [batch, width / 8]."""
        return {**output, "embedding": self._quantized(output["embedding"].float().cpu().numpy())}

    def _quantized(self, vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self._ranges is None:
            bits = np.packbits(vectors > 0, axis=-1)
            return bits if self._precision == "ubinary" else (bits.astype(np.int16) - _OFFSET).astype(np.int8)
        start, end = self._ranges
        steps = (end - start) / 255
        values: np.ndarray[Any, Any] = np.clip(
            np.floor((vectors - start) / np.where(steps == 0, 1, steps)), 0, 255
        )
        return values.astype(np.uint8) if self._precision == "uint8" else (values - _OFFSET).astype(np.int8)


def read_ranges(path: Path, width: int) -> np.ndarray[Any, Any]:
    """Return least and greatest value [2, width] of the vectors in a .npy file.

    Raises:
        JobUsageError: it holds no such vectors.
    """
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise JobUsageError(f"--calibration {path} cannot be read: {error}", _REMEDY) from error
    if vectors.ndim != 2 or vectors.shape[1] != width or len(vectors) < 2 or vectors.dtype.kind != "f":
        raise JobUsageError(
            f"--calibration {path} holds {vectors.dtype}{list(vectors.shape)}, "
            f"not vectors [2 or more, {width}]",
            _REMEDY,
        )
    return np.stack([vectors.min(0), vectors.max(0)]).astype(np.float32)


_REMEDY = "Embed some hundred texts with --precision float32 and numpy.save their vectors."
