"""Engines in the workers of a real cluster: Ray Data and actors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import pytest

pytest.importorskip("ray.data")

import ray
import ray_data

from .conftest import ROOT

pytestmark = [
    pytest.mark.timeout(120),
    # Of Ray itself, which leaves files, sockets and processes to the end of the interpreter.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("cluster"),
]

MODEL = "models_for_tests:Picky"  # refuses a row that starts with 13


def test_a_pipeline_reads_and_writes_by_ray_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example keeps every row beside its outputs, bad ones with their reason, each row once."""
    rows = [{"number": index, "x": [float(index), 1.0, 2.0]} for index in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    places = [str(tmp_path / "in.parquet"), str(tmp_path / "out")]
    ray_data.main([*places, "--model", MODEL, "--column", "x", "--cpus", "2", "--batch-size", "16"])
    assert capsys.readouterr().out == "40 rows, 1 of them bad\n"
    found = {row["number"]: row for row in pyarrow.dataset.dataset(places[1]).to_table().to_pylist()}
    assert len(found) == 40
    for row in rows:
        other = found[row["number"]]
        is_bad = row["number"] == 13
        assert list(other["x"]) == row["x"]
        assert other["error"] == ("ValueError: thirteen brings bad luck" if is_bad else "")
        np.testing.assert_equal(other["total"], np.nan if is_bad else sum(row["x"]))


def test_the_programs_of_the_page_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs of docs/ray.md, for Ray Data and with an actor, find what they say they find."""
    monkeypatch.setattr(ray, "init", lambda: None)  # in this cluster
    programs = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "ray.md").read_text(), re.M | re.S)
    assert len(programs) == 2
    for program in programs:
        exec(compile(program, "ray.md", "exec"), {"__name__": "__main__"})
