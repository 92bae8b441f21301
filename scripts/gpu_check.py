"""The proof on a GPU; run by scripts/gpu_check.

Prints versions, runs the tests marked `gpu`, the kernels' benchmarks, calls, steps and a batcher on one lane
beside plain torch, and training steps on two lanes of one GPU. gpu.json and gpu.md are written after every
part, so that a run which is cut off leaves what it has. Ends with a line of what passed, failed and was
skipped. Without a GPU it says so, writes nothing and ends well; `--dry` runs all but the kernels and the two
lanes with tiny sizes on the CPU, to see that the check itself works.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import machine
import torch

from asyncdp import _kernels as kernels

ROOT = Path(__file__).parent.parent
# Together under 10 minutes, with a margin for start and the report.
TESTS_SECONDS, BENCHMARKS_SECONDS, TRAINING_SECONDS, DEVICE_SECONDS = 240, 70, 120, 140
NUM_PROCESSES = 3
TRAINING = ("--devices", "cuda:0,cuda:0", "--workloads", "mlp1024", "encoder", "--launches", "1")
PACKAGES = (
    *("torch", "numpy", "numba", "numba-cuda", "cuda-core"),
    *("nvidia-cuda-nvrtc", "nvidia-nvvm", "nvidia-nvjitlink"),
)
# A benchmark's name starts with the first, its figure is the second, and the aim is at least the third.
AIMS = (
    ("reduce_add N", "of_copy", 0.92),
    ("reduce_add N=8", "of_chain", 2.5),
    ("reduce_add_many", "of_chain", 10.0),
    ("gather", "of_cat", 1.0),
)


def versions() -> dict[str, str]:
    """Name everything the result depends on."""
    found = {
        **machine.origin(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
    }
    del found["date"], found["torch"]  # given to the minute, and with the other packages
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["torch's CUDA"] = str(torch.version.cuda)
        found["driver"] = driver()
        found["device"] = torch.cuda.get_device_name(0)
        found["devices"] = str(torch.cuda.device_count())
    return found


def driver() -> str:
    """Name the version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def run_tests() -> dict[str, object]:
    """Run the tests marked `gpu` and count how they ended."""
    files = [
        str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()
    ]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        spread = ["-n", str(NUM_PROCESSES), "--dist", "loadfile"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-rs",
            *spread,
            f"--junitxml={report}",
            *files,
        ]
        try:
            subprocess.run(command, cwd=ROOT, timeout=TESTS_SECONDS, check=False)
            suite = next(ElementTree.parse(report).iter("testsuite"))
        except (subprocess.TimeoutExpired, FileNotFoundError) as error:
            failures = [f"the tests did not end: {error}"]
            return {"passed": 0, "failed": 1, "skipped": 0, "failures": failures, "reasons": {}}
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    failures = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    reasons = Counter(str(each.get("message")) for each in suite.iter("skipped"))
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "failures": failures,
        "reasons": dict(reasons),
    }


def run_benchmarks() -> dict[str, dict[str, float]]:
    """Run scripts/bench_kernels.py and return its figures; empty where it failed."""
    with tempfile.TemporaryDirectory() as directory:
        figures = Path(directory, "figures.json")
        command = [sys.executable, str(ROOT / "scripts" / "bench_kernels.py"), "--json", str(figures)]
        try:
            subprocess.run(command, cwd=ROOT, timeout=BENCHMARKS_SECONDS, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"the benchmarks did not end: {error}")
            return {}
        return dict(json.loads(figures.read_text()))


def run_training() -> tuple[dict[str, object], str]:
    """Run scripts/bench_training.py on two lanes of one GPU; return its figures and its page, or nothing."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(ROOT / "scripts" / "bench_training.py"), *TRAINING, "--out", directory]
        try:
            subprocess.run(command, cwd=ROOT, timeout=TRAINING_SECONDS, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"the training steps did not end: {error}")
            return {}, ""
        page = Path(directory, "bench_training.md").read_text()
        return json.loads(Path(directory, "bench_training.json").read_text()), page


def run_device(*, dry: bool) -> list[dict[str, object]]:
    """Run scripts/bench_device.py; return the rows that it has written, also if it was cut off."""
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory, "rows.jsonl")
        rows.touch()
        command = [sys.executable, str(ROOT / "scripts" / "bench_device.py"), "--json", str(rows)]
        try:
            subprocess.run([*command, *["--dry"] * dry], cwd=ROOT, timeout=DEVICE_SECONDS, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"calls, steps and batcher did not end: {error}")
        return [json.loads(line) for line in rows.read_text().splitlines()]


def verdicts(benchmarks: dict[str, dict[str, float]]) -> list[tuple[str, float, float]]:
    """Return each aim that was measured: what, its figure, and the least it should be."""
    return [
        (f"{name}: {figure}", values[figure], least)
        for name, values in benchmarks.items()
        for prefix, figure, least in AIMS
        if name.startswith(prefix) and figure in values
    ]


def markdown(result: dict[str, object], aims: list[tuple[str, float, float]]) -> str:
    """Write the result for a reader."""
    tests, benchmarks = result["tests"], result["benchmarks"]
    assert isinstance(tests, dict)
    assert isinstance(benchmarks, dict)
    assert isinstance(result["versions"], dict)
    lines = ["# On a GPU", "", f"Measured by `scripts/gpu_check` on {result['date']}.", ""]
    lines += [f"- {name}: {version}" for name, version in result["versions"].items()]
    lines += [
        "",
        f"Tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped.",
        "",
    ]
    lines += [f"- failed: {name}" for name in tests["failures"]]
    lines += [f"- skipped: {count}, {reason}" for reason, count in tests["reasons"].items()]
    lines += ["", "| aim | measured | at least | |", "| --- | --- | --- | --- |"]
    lines += [f"| {what} | {figure:.2f} | {least} | {met(figure, least)} |" for what, figure, least in aims]
    lines += [
        "",
        "All figures, as shares of this run's copy bandwidth (`of_copy`) or ratios to torch's way:",
        "",
    ]
    for name, values in benchmarks.items():
        lines.append(f"- {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    return "\n".join(lines) + "\n"


def device_table(rows: Sequence[dict[str, object]]) -> list[str]:
    """Write the rows of scripts/bench_device.py for a reader."""
    lines = ["", "## One lane beside plain torch", "", "| what | measured | aim |", "| --- | --- | --- |"]
    for row in rows:
        figures = [
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if name not in ("row", "aim")
        ]
        lines.append(f"| {row['row']} | {', '.join(figures)} | {row['aim']} |")
    return lines


def write(folder: Path, result: dict[str, object], page: str = "") -> None:
    """Write what there is so far."""
    benchmarks, rows = result["benchmarks"], result["device"]
    assert isinstance(benchmarks, dict)
    assert isinstance(rows, list)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    text = markdown(result, verdicts(benchmarks)) + "\n".join(device_table(rows)) + "\n"
    (folder / "gpu.md").write_text(text + (f"\n#{page}" if page else ""))


def met(figure: float, least: float) -> str:
    """Say whether an aim was met."""
    return "met" if figure >= least else "not met"


def main() -> None:
    """Check, write and sum up; the exit status is 1 where a test failed or a benchmark did not end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU; name an --output")
    arguments = parser.parse_args()
    found = versions()
    for name, version in found.items():
        print(f"{name}: {version}")
    report = kernels.report("cuda:0")
    if report.implementation != "numba" and not arguments.dry:
        print(
            f"No GPU check was run: {'; '.join(report.missing) or report.reason}. To run it: {report.remedy}."
        )
        print("passed 0, failed 0, skipped all")
        return
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    tests = run_tests()
    result: dict[str, object] = {
        "date": date,
        "versions": found,
        "tests": tests,
        "benchmarks": {},
        "device": [],
        "training": {},
    }
    write(arguments.output, result)
    benchmarks = {} if arguments.dry else run_benchmarks()
    result["benchmarks"] = benchmarks
    write(arguments.output, result)
    rows = result["device"] = run_device(dry=arguments.dry)
    write(arguments.output, result)
    training, page = ({}, "") if arguments.dry else run_training()
    result["training"] = training
    write(arguments.output, result, page)
    aims = verdicts(benchmarks)
    missed = [what for what, figure, least in aims if figure < least]
    print(f"aims: {len(aims) - len(missed)} met, {len(missed)} not met {missed or ''}")
    print(f"passed {tests['passed']}, failed {tests['failed']}, skipped {tests['skipped']}")
    is_whole = bool(rows) and (arguments.dry or (bool(benchmarks) and bool(training)))
    sys.exit(bool(tests["failed"]) or not is_whole)


if __name__ == "__main__":
    main()
