"""What each kind of picture and array becomes, and which are refused with a reason."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from asyncdp.errors import InputError, RecordError
from asyncdp.infer.readers import decode_image

MEANS = "models_for_tests:Means"


def saved(work, image, name="a.png", **options):
    image.save(work / name, **options)
    return decode_image(work / name)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_grey(work, name):
    """It is scaled, not cut off at 255."""
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    image = saved(work, Image.fromarray(ramp), name)
    assert (image.mode, np.asarray(image).mean()) == ("RGB", 127.5)
    assert image.getpixel((15, 15)) == (255, 255, 255)


def test_a_transparent_16_bit_grey(work):
    """It is white, as other transparency is, and not the grey that nobody sees."""
    image = Image.fromarray(np.array([[7, 700]], np.uint16))
    found = saved(work, image, transparency=700)
    assert [found.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


def test_floating_point_grey(work):
    """From black, 0, to white, 1; a picture in another range is refused, not made black."""
    image = saved(work, Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "a.tiff")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    for wrong in (200.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="must be from 0, black, to 1, white"):
            saved(work, Image.fromarray(np.array([[0, wrong]], np.float32)), "b.tiff")
    with pytest.raises(ValueError, match="32-bit integer pixels is unknown"):
        saved(work, Image.fromarray(np.array([[7]], np.int32)), "c.tiff")


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_transparency_is_put_on_white(work, mode, colour, expected):
    """Not the colour that nobody sees below it."""
    assert saved(work, Image.new(mode, (2, 2), colour)).getpixel((0, 0)) == expected


def test_a_transparent_colour_of_a_palette(work):
    """It counts as transparency, too."""
    image = Image.new("P", (2, 1), 1)
    image.putpalette([9, 9, 9, 0, 0, 255])
    image.putpixel((0, 0), 0)
    found = saved(work, image, transparency=0)
    assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 255)]


def test_cmyk(work):
    """Ink becomes light."""
    assert saved(work, Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "a.tiff").getpixel((0, 0)) == (255, 0, 0)


def test_pictures_are_upright(work):
    """A camera that was turned says so in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert saved(work, Image.new("RGB", (20, 10)), "a.jpg", exif=exif).size == (10, 20)


def test_large_pictures(work, monkeypatch):
    """A warning of the library refuses nothing; twice as many pixels do."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert saved(work, Image.new("L", (15, 10))).size == (15, 10)
    with pytest.raises(Image.DecompressionBombError):
        saved(work, Image.new("L", (21, 10)))


@pytest.mark.parametrize("name", ["a.gif", "a.tiff", "a.webp"])
def test_further_frames_are_not_passed_over(run, work, name):
    """A picture of several is a bad record, unless the first is what is wanted."""
    (work / "in").mkdir()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "white")]
    frames[0].save(work / "in" / name, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(
        RecordError, match=r"has 3 frames or pages: save each as a file, or give --first-frame"
    ):
        run(work / "in", MEANS, columns=())
    run(work / "in", MEANS, columns=(), first_frame=True, output=work / "first")
    (mean,) = pq.read_table(work / "first" / "part-000000.parquet")["output"].to_pylist()
    np.testing.assert_allclose(mean, [1, 0, 0], atol=0.02)


def test_files_that_no_reader_takes_are_counted(run, work):
    """By suffix, in the summary."""
    (work / "in").mkdir()
    Image.new("RGB", (1, 1)).save(work / "in" / "a.png")
    for name in ("b.heic", "c.HEIC", "d.xml", "README", ".hidden", "_journal.csv"):
        (work / "in" / name).write_text("x")
    summary = run(work / "in", MEANS, columns=())
    assert summary.passed_over == {".heic": 2, ".xml": 1, "without suffix": 1}
    assert json.loads((work / "out" / "_summary.json").read_text())["passed_over"] == summary.passed_over


UNFIT = {
    "uint64": np.zeros(2, np.uint64),
    r"datetime64\[D\]": np.zeros(2, "M8[D]"),
    r"\[\('a', '<i4'\)\]": np.zeros(2, [("a", "<i4")]),
}


@pytest.mark.parametrize("dtype", UNFIT)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_dtypes_that_no_model_takes(run, work, dtype, suffix):
    """One error at the start instead of a bad record per row, unless a function may convert them."""
    path = work / f"a.{suffix}"
    np.save(path, UNFIT[dtype]) if suffix == "npy" else np.savez(path, value=UNFIT[dtype])
    with pytest.raises(InputError, match=rf"array 'value' is {dtype}, which no model takes\. Convert it"):
        run(path, "models_for_tests:Lengths", columns=())
    own = {"preprocess": "models_for_tests:as_text", "columns": ()}
    assert run(path, "models_for_tests:Lengths", **own).num_records == 2


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2"])
def test_arrays_of_the_other_byte_order(run, work, suffix, dtype):
    """They are read like any other, one-dimensional or not."""
    array = np.arange(6).reshape(2, 3).astype(dtype)
    path = work / f"a.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, value=array)
    run(path, "models_for_tests:Sums", columns=())
    assert pq.read_table(work / "out" / "part-000000.parquet")["total"].to_pylist() == [3, 12]


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_an_array_without_rows(run, work, suffix):
    """A single value is told as such; beside others it does not matter when they are named."""
    path = work / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, np.float32(1))
    else:
        np.savez(path, scale=np.float32(1), x=np.zeros((2, 3), np.float32), o=np.array([None]))
    with pytest.raises(InputError, match=r"is a single value|holds Python objects"):
        run(path, "models_for_tests:Sums", columns=())
    if suffix == "npz":
        assert run(path, "models_for_tests:Sums", columns=("x",)).num_records == 2


def test_lines_that_are_too_long(run, work, monkeypatch):
    """The error says how long they may be, and does not call the file damaged."""
    from asyncdp.infer.readers import base

    monkeypatch.setattr(base, "_MAX_LINE", 1 << 20)
    (work / "a.txt").write_text("a\n" + "b" * (1 << 20) + "c\n")
    with pytest.raises(InputError, match=r"line 2 is longer than 1 MiB\. Split it"):
        run(work / "a.txt", "models_for_tests:Lengths", columns=())
