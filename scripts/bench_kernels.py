"""The kernels' benchmarks; run by scripts/bench_kernels.

Every figure of a GPU is a share of the copy bandwidth of the same run, or a ratio to torch's own way,
the two measured in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from asyncdp import _kernels as kernels
from asyncdp._kernels import reference

ROUNDS = 9
MIB = 1 << 20

LAUNCH_COST = """
import time
from statistics import median
from asyncdp._kernels.source import cuda

launch.load("copy", 0)
stream = cuda.external_stream(0x2000)
empty = cuda.jit(lambda table, num_rows: None)
ways = {
    "launch": lambda: launch.launch("copy", 0, 100, 1 << 40, 5),
    "numba_dispatcher": lambda: empty[100, 256, stream](1 << 40, 5),
}
times = {name: [] for name in ways}
for _ in range(15):
    for name, way in ways.items():
        start = time.perf_counter()
        for _ in range(2000):
            way()
        times[name].append((time.perf_counter() - start) / 2000 * 1e6)
print(median(times["launch"]), median(times["numba_dispatcher"]))
"""


def measure_launch() -> dict[str, float]:
    """Measure the host's cost of a launch in microseconds, against a driver that does nothing."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "kernels"))
    from stub_driver import compiler, run_under_stub

    if compiler() is None:
        print("launch: not measured, there is no C compiler for the stub of the driver")
        return {}
    with tempfile.TemporaryDirectory() as directory:
        ours, numba = map(float, run_under_stub(LAUNCH_COST, Path(directory)).split())
    print(f"launch: {ours:.2f} us, Numba's dispatcher {numba:.2f} us, both against a stub of the driver")
    return {"launch_us": ours, "numba_dispatcher_us": numba}


def measure(*ways: Callable[[], object]) -> list[float]:
    """Return the median seconds of each way on the GPU, measured in turns."""
    for way in ways:
        way()
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for way, seconds in zip(ways, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # A device that is busy until all is enqueued leaves the host's own time out of the measurement.
            torch.cuda._sleep(10_000_000)
            start.record()
            way()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
    return [median(seconds) for seconds in times]


def chain(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum as torch code does: a copy and a chain of `add_`."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total


def foreach(groups: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Sum many tensors with torch's own multi-tensor addition."""
    totals = [group[0].clone() for group in groups]
    for lane in range(1, len(groups[0])):
        torch._foreach_add_(totals, [group[lane] for group in groups])
    return totals


def bench_reduce_add(device: torch.device, num_inputs: int) -> dict[str, float]:
    """Sum 256 MiB tensors in one pass."""
    tensors = [torch.randn(64 * MIB, device=device) for _ in range(num_inputs)]
    target = torch.empty_like(tensors[0])
    ours, chained, copy = measure(
        lambda: kernels.reduce_add(tensors, device), lambda: chain(tensors), lambda: target.copy_(tensors[0])
    )
    num_bytes = tensors[0].nbytes
    share = ((num_inputs + 1) * num_bytes / ours) / (2 * num_bytes / copy)
    return {
        "gb_per_s": (num_inputs + 1) * num_bytes / ours / 1e9,
        "of_copy": share,
        "of_chain": chained / ours,
    }


def bench_many(device: torch.device, shapes: list[tuple[int, ...]]) -> dict[str, float]:
    """Sum the gradients of a model over 4 lanes in one launch."""
    groups = [[torch.randn(shape, device=device) for _ in range(4)] for shape in shapes]
    source = torch.empty(64 * MIB, device=device)
    target = torch.empty_like(source)
    ours, chained, many, copy = measure(
        lambda: kernels.reduce_add_many(groups, device),
        lambda: [chain(group) for group in groups],
        lambda: foreach(groups),
        lambda: target.copy_(source),
    )
    num_bytes = 5 * sum(group[0].nbytes for group in groups)  # of four inputs and their sum
    share = (num_bytes / ours) / (2 * source.nbytes / copy)
    host = measure_host(lambda: kernels.reduce_add_many(groups, device))
    return {
        "ms": ours * 1e3,
        "host_ms": host * 1e3,
        "of_copy": share,
        "of_chain": chained / ours,
        "of_foreach": many / ours,
    }


def measure_host(way: Callable[[], object]) -> float:
    """Return the median seconds a call keeps its thread, without the time of the device."""
    import time

    seconds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return median(seconds)


def bench_gather(device: torch.device, shape: tuple[int, ...], dim: int) -> dict[str, float]:
    """Concatenate four shards, beside torch.cat."""
    shards = [torch.randn(shape, device=device) for _ in range(4)]
    whole = torch.cat(shards, dim)
    target = torch.empty_like(whole)
    ours, cat, copy = measure(
        lambda: kernels.gather(shards, dim, device),
        lambda: torch.cat(shards, dim),
        lambda: target.copy_(whole),
    )
    return {"gb_per_s": 2 * whole.nbytes / ours / 1e9, "of_copy": copy / ours, "of_cat": cat / ours}


def resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of the 161 parameters of ResNet-50."""

    def unit(inputs: int, outputs: int, size: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes, inputs = unit(3, 64, 7), 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            shapes += unit(inputs, width, 1) + unit(width, width, 3) + unit(width, 4 * width, 1)
            shapes += unit(inputs, 4 * width, 1) if block == 0 else []
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def bert() -> list[tuple[int, ...]]:
    """Return the shapes of the 199 parameters of a 12-layer BERT with its pooler."""

    def linear(inputs: int, outputs: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs), (outputs,)]

    norm: list[tuple[int, ...]] = [(768,), (768,)]
    layer = linear(768, 768) * 4 + norm + linear(768, 3072) + linear(3072, 768) + norm
    return [(30522, 768), (512, 768), (2, 768), *norm, *(layer * 12), *linear(768, 768)]


def verify(device: torch.device) -> None:
    """Check that what is measured is also right."""
    groups = [[torch.randn(shape, device=device) for _ in range(4)] for shape in resnet50()]
    sums = zip(
        kernels.reduce_add_many(groups, device), reference.reduce_add_many(groups, device), strict=True
    )
    assert all(torch.equal(sum_, expected) for sum_, expected in sums)


def bench_device(device: torch.device) -> dict[str, dict[str, float]]:
    """Run every benchmark that needs a GPU."""
    kernels.warm_up(device)
    verify(device)
    results = {f"reduce_add N={n}, 256 MiB": bench_reduce_add(device, n) for n in (2, 4, 8)}
    results["reduce_add_many ResNet-50, 4 lanes"] = bench_many(device, resnet50())
    results["reduce_add_many BERT, 4 lanes"] = bench_many(device, bert())
    for shape in ((256, 512, 512), (257, 511, 513)):
        for dim in (0, 1, -1):
            results[f"gather 4 of {shape}, dim {dim}"] = bench_gather(device, shape, dim)
    return results


def main() -> None:
    """Run what can be run here, print it, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {"launch path": measure_launch()}
    report = kernels.report("cuda:0")
    if report.implementation == "numba":
        figures |= bench_device(torch.device("cuda", 0))
        for name, values in figures.items():
            print(name + ": " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    else:
        print(f"No benchmark of a GPU was run: {'; '.join(report.missing) or report.reason}.")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
