"""Images as RGB."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..places import open_place

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def decode_image(path: Path | io.BytesIO, *, first_frame: bool = False) -> Any:
    """Load an image as RGB, upright, as docs/infer.md says; one that would fill the memory is refused.

    Args:
        path: the file, or its contents.
        first_frame: whether further frames or pages are left out; else they are an error.

    Raises:
        ValueError: there are further frames, or the range of the pixels' values is unknown.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # From twice as many pixels on the library refuses by itself.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = contextlib.nullcontext(path) if isinstance(path, io.BytesIO) else open_place(path)
        with opened as file, Image.open(file) as image:
            frames = getattr(image, "n_frames", 1)
            # Cameras store previews and the like behind a JPEG (MPO).
            if frames > 1 and not first_frame and image.format != "MPO":
                raise ValueError(
                    f"the image has {frames} frames or pages: save each as a file, or give --first-frame"
                )
            ImageOps.exif_transpose(image, in_place=True)
            return _as_rgb(image)


def _as_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        pixels = np.asarray(image).astype(np.float64)
        pixels[pixels == image.info.get("transparency", -1)] = 65535  # as on white
        return _from_numbers(pixels / 65535)
    if image.mode == "F":
        return _from_numbers(np.asarray(image))
    if image.mode == "I":
        raise ValueError("the range of 32-bit integer pixels is unknown: save them as 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_numbers(grey: np.ndarray[Any, Any]) -> Any:
    """Make an image of greys from 0 to 1."""
    from PIL import Image

    if not bool(((grey >= 0) & (grey <= 1)).all()):
        raise ValueError("floating-point pixels must be from 0, black, to 1, white")
    return Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert("RGB")
