"""Jobs on CUDA lanes; the same tests run on CPU lanes everywhere."""

from __future__ import annotations

import numpy as np
import pytest

DEVICES = ["cpu*2", pytest.param("cuda:0*2", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("devices", DEVICES)
def test_a_job_gives_what_the_cpu_gives(run, numbers, work, devices):
    """Every record's result is there, in order, whichever lane computed it."""
    assert run(numbers(300), devices=devices, output_format="npy").num_records == 300
    rows = np.concatenate([np.load(path) for path in sorted((work / "out").glob("part-*.npy"))])
    assert rows["total"].tolist() == [index + 1.0 for index in range(300)]
    assert rows["double"].tolist() == [[2.0 * index, 2.0, 0.0] for index in range(300)]


@pytest.mark.parametrize("devices", DEVICES)
def test_embeddings_are_those_of_one_lane(run, work, encoder_folder, devices):
    """Texts of different lengths become the vectors that one CPU lane gives them."""
    words = ["one", "two", "three", "four"]
    lines = [" ".join(words[: 1 + index % 4][:: 1 - 2 * (index % 2)]) for index in range(60)]
    (work / "t.txt").write_text("\n".join(lines) + "\n")
    options = {"task": "embed", "columns": (), "output_format": "npy"}
    run(work / "t.txt", str(encoder_folder), devices="cpu", output=work / "expected", **options)
    run(work / "t.txt", str(encoder_folder), devices=devices, **options)
    found, expected = (
        np.concatenate([np.load(path) for path in sorted((work / name).glob("part-*.npy"))])
        for name in ("out", "expected")
    )
    for name in expected.dtype.names:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
