"""Damaged images and damaged compressed files, of every format: bad records or errors that name the file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma

import anyio
import numpy as np
import pyarrow as pa
import pytest
from fake_engine import FakeEngine, options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from asyncdp.errors import DamagedInputError
from asyncdp.infer.batching import cut_windows
from asyncdp.infer.pipeline import Pipeline
from asyncdp.infer.readers import Selection, decode_image, open_inputs
from asyncdp.infer.report.monitor import Monitor
from asyncdp.infer.steps import EachValue, Steps, default_collate, length_of, same

FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def zstd(data):
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as compressed:
        compressed.write(data)
    return stream.getvalue().to_pybytes()


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
LINES = [f"line {index} {index * index % 97}" for index in range(60)]
COMPRESSED = {
    suffix: compress("".join(f"{line}\n" for line in LINES).encode()) for suffix, compress in COMPRESS.items()
}


def picture(name):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, name)
    return file.getvalue()


PICTURES = {name: picture(name) for name in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")}

cuts = st.integers(0, 10_000).map(lambda end: lambda data: data[: end % len(data)])
tails = st.binary(min_size=1, max_size=40).map(lambda tail: lambda data: data + tail)
heads = st.integers(0, 20).flatmap(
    lambda kept: st.binary(max_size=60).map(lambda rest: lambda data: data[:kept] + rest)
)
flips = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4).map(
    lambda several: lambda data: flipped(data, several)
)
damages = st.one_of(cuts, tails, heads, flips)


def flipped(data, several):
    changed = bytearray(data)
    for position, bits in several:
        changed[position % len(data)] ^= bits
    return bytes(changed)


@settings(FUZZ, max_examples=150)
@given(suffix=st.sampled_from(list(COMPRESS)), damage=damages)
def test_damaged_compressed_text(tmp_path, suffix, damage):
    """A compressed file that is damaged is an error that names it; none ends early without an error."""
    path = tmp_path / f"rows.txt{suffix}"
    path.write_bytes(damage(COMPRESSED[suffix]))
    try:
        records = list(open_inputs([str(path)], None, Selection()).read())
    except DamagedInputError as error:
        text = str(error)
        assert f"rows.txt{suffix} cannot be read" in text
    else:
        # Zstandard has no checksum unless one was asked for, so changed bytes may give changed text.
        assert suffix == ".zst" or [record.value for record in records] == LINES
        assert records


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_empty_compressed_file_is_damaged(tmp_path, suffix):
    """An empty file is no compressed file, but one whose writing was cut short."""
    path = tmp_path / f"rows.txt{suffix}"
    path.write_bytes(b"")
    with pytest.raises(DamagedInputError, match=r"cannot be read: EOFError: the file is empty"):
        list(open_inputs([str(path)], None, Selection()).read())
    path.write_bytes(COMPRESS[suffix](b""))
    assert list(open_inputs([str(path)], None, Selection()).read()) == []


@settings(FUZZ, max_examples=30)
@given(name=st.sampled_from(list(PICTURES)), damage=damages)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images(tmp_path, monkeypatch, name, damage):
    """A damaged image is a bad record with its file named, or decodes to something; the others are done."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    for other, data in PICTURES.items():
        (tmp_path / f"a.{other.lower()}").write_bytes(damage(data) if other == name else data)
    written = []
    pipeline = Pipeline(
        FakeEngine(lambda sizes: sizes),
        Steps(EachValue(size_of), default_collate, same, length_of),
        options(batch_size=4, shard_size=8, on_error="record"),
        lambda index, num_records, rows, failures: written.append((num_records, rows.finish()[0], failures)),
        Monitor(),
    )
    records = open_inputs([str(tmp_path)], None, Selection((), "path")).read_together()
    windows = cut_windows(records, block_size=8, window=8, wanted=lambda block: True)
    anyio.run(pipeline.run, windows)
    ((num_records, ids, failures),) = written
    assert (num_records, len(ids) + len(failures)) == (6, 6)
    for failure in failures:
        assert failure.where == failure.id == str(tmp_path / f"a.{name.lower()}")
        assert "decode_image" in failure.traceback


def size_of(path):
    image = decode_image(path)
    assert image.mode == "RGB"
    return [image.width, image.height]
