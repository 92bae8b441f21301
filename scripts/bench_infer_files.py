"""Files of small records through models that cost little, beside the plainest code that does the same.

Used by scripts/bench_infer: `jsonl` compares with pyarrow and orjson alone, `images` with a loop over torch's
DataLoader with as many workers. The ways take turns, in changing order.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import machine
import numpy as np
import orjson
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import torch
from PIL import Image

import asyncdp

NUM_OUTPUTS = 10
WORKERS = 2


def free_model() -> torch.nn.Module:
    """Return a model that costs nothing."""
    return torch.nn.Identity()


def small_network() -> torch.nn.Module:
    """Return a network of some convolutions."""
    torch.manual_seed(0)
    nn = torch.nn
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, NUM_OUTPUTS)),
    )


def bench_jsonl(count: int, rounds: int) -> dict[str, Any]:
    """Copy a column of numbers from JSONL to Parquet, by a job and by hand."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        with open(source, "w") as file:
            for index in range(count):
                file.write(
                    json.dumps({"id": f"r{index}", "x": [index / 2, 1.0, 2.0], "y": "some text"}) + "\n"
                )
        options = {"column": "x", "id_column": "id", "batch_size": 1024, "window": 8192, "shard_size": 65536}
        ways = {
            "asyncdp infer": functools.partial(run_job, source, "bench_infer_files:free_model", options),
            "pyarrow and orjson alone": functools.partial(convert_by_hand, source),
        }
        return {"records": count, **take_turns(ways, count, rounds)}


def convert_by_hand(source: Path) -> np.ndarray:
    ids, numbers = [], []
    with open(source, "rb") as file:
        for line in file:
            entry = orjson.loads(line)
            ids.append(entry["id"])
            numbers.append(entry["x"])
    array = np.array(numbers, dtype=np.float32)
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.reshape(-1)), 3)
    pyarrow.parquet.write_table(pyarrow.table({"id": ids, "output": column}), source.with_suffix(".parquet"))
    return array


def bench_images(count: int, rounds: int) -> dict[str, Any]:
    """Run a small network over a folder of small pictures, by a job and by a loop over a DataLoader."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        for index in range(count):
            smooth = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(smooth).resize((96, 96)).save(pictures / f"{index:06d}.jpg")
        ways: dict[str, Callable[[], np.ndarray]] = {
            "asyncdp infer": functools.partial(
                run_job, pictures, "bench_infer_files:small_network", {"workers": WORKERS}
            ),
            "loop over a DataLoader": functools.partial(run_loop, sorted(pictures.iterdir())),
        }
        return {"records": count, "workers": WORKERS, **take_turns(ways, count, rounds)}


class Pictures(torch.utils.data.Dataset):
    """What a person would write."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = np.array(Image.open(self.paths[index]).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def run_loop(paths: list[Path]) -> np.ndarray:
    model = small_network().eval()
    loader = torch.utils.data.DataLoader(Pictures(paths), batch_size=32, num_workers=WORKERS)
    with torch.inference_mode():
        outputs = [model(batch) for batch in loader]
    array = torch.cat(outputs).numpy()
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.reshape(-1)), NUM_OUTPUTS)
    pyarrow.parquet.write_table(pyarrow.table({"output": column}), paths[0].parent.parent / "loop.parquet")
    return array


def run_job(source: Path, model: str, options: dict[str, Any]) -> np.ndarray:
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        output = Path(folder, "out")
        run = functools.partial(asyncdp.infer.run, source, model=model, output=output, **options)
        anyio.run(run)
        table = pyarrow.dataset.dataset(output, format="parquet").to_table()
        numbers = table["output"].combine_chunks().flatten().to_numpy()
        return numbers.reshape(table.num_rows, -1)


def take_turns(ways: dict[str, Callable[[], np.ndarray]], count: int, rounds: int) -> dict[str, Any]:
    """Time all ways in every round; they must give the same numbers."""
    results = [way() for way in ways.values()]  # which also warms them up
    for other in results[1:]:
        if not np.allclose(results[0], other, atol=1e-5):
            raise SystemExit("the ways do not compute the same")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in [*ways][:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            ways[name]()
            rates[name].append(count / (time.perf_counter() - start))
        print(", ".join(f"{name} {values[-1]:,.0f}/s" for name, values in rates.items()), flush=True)
    ours, theirs = rates.values()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "rounds": rounds,
        "load_at_start": machine.load(),
        "records_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio_median_round": statistics.median(ratios),
        "rates": rates,
    }


if __name__ == "__main__":
    bench = {"jsonl": bench_jsonl, "images": bench_images}[sys.argv[1]]
    print(json.dumps(bench(int(sys.argv[2]), int(sys.argv[3])), indent=1))
