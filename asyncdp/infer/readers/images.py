"""Folders of images; decoding happens later, in the worker threads of preprocessing."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import MissingExtraError
from ..records import Row
from .base import Contents, InputFile, Selection

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class ImageReader:
    """Every file is one record; with the id column `path` its id is the file's path."""

    binary = True

    def inspect(self, file: InputFile) -> Contents:
        """Return that a file is one row, with the path that identifies it."""
        return Contents(1, ("path",))

    def rows(self, file: InputFile, selection: Selection, start: int) -> Iterator[Row]:
        """Yield the path of the image."""
        if importlib.util.find_spec("PIL") is None:
            raise MissingExtraError("Reading images", "pillow", "cli")
        row = selection.row({"path": str(file.path)}, file.name)
        yield row if row.error else row._replace(value=file.path)


def decode_image(path: Path) -> Any:
    """Load an image as RGB; one whose size looks like an attack on the memory is refused."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            return image.convert("RGB")
