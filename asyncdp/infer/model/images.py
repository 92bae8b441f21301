"""Images to what a model of transformers takes, by the folder's own processor."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import MissingExtraError, ModelLoadError
from ..readers.images import decode_image
from .folders import import_transformers
from .names import brief


class Process:
    """Images -> tensors of pixels.

    Args:
        processor: of the folder.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, values: Sequence[Any]) -> list[torch.Tensor]:
        """Process all images at once."""
        pixels = self.processor(images=[_as_image(value) for value in values], return_tensors="pt")
        return list(pixels["pixel_values"])


def stack_pixels(items: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put the images of a batch, all of one size, into one tensor."""
    return {"pixel_values": torch.stack(list(items))}


def load_image_processor(folder: Path) -> Any:
    """Load the image processor of a folder.

    Raises:
        MissingExtraError: a library that it needs is not installed.
        ModelLoadError: the folder has none.
    """
    try:
        return import_transformers().AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except ImportError as error:
        raise MissingExtraError("The folder's image processor", "torchvision and pillow", "embed") from error
    except Exception as error:
        raise ModelLoadError(
            f"The folder {folder} holds no image processor: {brief(error)}",
            "Copy preprocessor_config.json of the model into it.",
        ) from error


def _as_image(value: Any) -> Any:
    """Return an image that was read, or that is in a column as the bytes of a file."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return decode_image(io.BytesIO(value))
    if not hasattr(value, "convert"):
        raise TypeError(f"expected an image or its bytes, got {value!r:.80}; choose them with --column")
    return value
