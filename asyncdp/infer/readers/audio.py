"""Sound files as the samples of one channel."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MissingExtraError
from ..places import open_place

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"})

# What is written where the size is not known yet, as into a pipe; the largest of them varies a little.
_NO_SIZE = 0x7FFF0000
_OGG_PAGE_HEAD = 27
_MOST_OF_A_PAGE = 1 << 16


def decode_audio(path: Path | io.BytesIO) -> dict[str, Any]:
    """Load a sound file.

    Args:
        path: the file, or its contents.

    Returns:
        `array`, the mean of all channels as float32 [samples], integers scaled to -1 to 1, and
        `sampling_rate` in Hz.

    Raises:
        MissingExtraError: the library that reads it is not installed.
        ValueError: the file is damaged, cut short, empty, or holds samples that are no numbers.
    """
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("Reading audio", "soundfile", "audio") from error
    opened = contextlib.nullcontext(path) if isinstance(path, io.BytesIO) else open_place(path)
    with opened as stream:
        try:
            with soundfile.SoundFile(stream) as sound:
                samples = sound.read(dtype="float32", always_2d=True)
                stated, rate, kind, header = sound.frames, sound.samplerate, sound.format, sound.extra_info
        except soundfile.LibsndfileError as error:
            raise ValueError(f"the sound cannot be decoded: {error.error_string}") from error
        if len(samples) != stated or _is_cut(header) or (kind == "OGG" and _lacks_end(stream)):
            raise ValueError("the sound file is damaged or cut short: it states more than it holds")
    if not len(samples):
        raise ValueError("the sound file has no samples")
    if not np.isfinite(samples).all():
        raise ValueError("the sound file holds samples that are NaN or infinite")
    return {"array": samples.mean(axis=1, dtype=np.float64).astype(np.float32), "sampling_rate": rate}


def _is_cut(header: str) -> bool:
    """Return whether a size in a header, as the library lists it, is more than the file holds."""
    sizes = re.findall(r": (\d+) \(should be (\d+)\)", header)
    return any(int(found) < int(stated) < _NO_SIZE for stated, found in sizes)


def _lacks_end(stream: Any) -> bool:
    """Return whether an Ogg file lacks its last page, which is marked as such."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - 2 * _MOST_OF_A_PAGE))
    rest = stream.read()
    page = rest[rest.rfind(b"OggS") :]
    if len(page) < _OGG_PAGE_HEAD:
        return True
    lengths = page[_OGG_PAGE_HEAD : _OGG_PAGE_HEAD + page[_OGG_PAGE_HEAD - 1]]
    return not page[5] & 4 or len(page) < _OGG_PAGE_HEAD + len(lengths) + sum(lengths)
