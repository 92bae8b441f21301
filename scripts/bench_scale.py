"""A linear model over very many small rows in many files: memory, what bookkeeping costs, and a resume.

    scripts/bench_scale                                    20 million rows in 2,000 files of Parquet
    scripts/bench_scale --rows 1000000 --files 100         a twentieth of it

Runs the job in a process of its own, then kills another one at its end and resumes that. Writes
docs/results/scale.json and scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

WIDTH = 3

# Times what the job's bookkeeping takes, in the process of the job.
MEASURED = """
import json, sys, time
import asyncdp.cli
from asyncdp.infer import job
from asyncdp.infer.output import journal, output

spent = {"fingerprint": 0.0, "journal": 0.0, "digests of shards": 0.0}

def timed(owner, name, what):
    function = getattr(owner, name)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[what] += time.perf_counter() - start
    setattr(owner, name, wrapper)

timed(job, "fingerprint", "fingerprint")
timed(journal.Journal, "finish_block", "journal")
timed(output.OutputFolder, "_intact", "digests of shards")
start = time.perf_counter()
try:
    asyncdp.cli.main()
finally:
    spent["seconds"] = time.perf_counter() - start
    with open(FILE, "w") as file:
        json.dump(spent, file)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--format", choices=["parquet", "jsonl"], default="parquet")
    parser.add_argument("--folder", type=Path, default=None, help="where the files go; some gigabytes")
    parser.add_argument("--results", type=Path, default=machine.RESULTS / "scale.json")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        found = measure(Path(folder), chosen.rows, chosen.files, chosen.format)
    command = " ".join(["scripts/bench_scale", *sys.argv[1:]])
    result = {"command": command, **machine.origin(), "load_at_end": machine.load(), **found}
    chosen.results.write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    chosen.results.with_suffix(".md").write_text(text)
    print(text)


def model() -> torch.nn.Module:
    """Return the linear model."""
    torch.manual_seed(0)
    return torch.nn.Linear(WIDTH, 2)


def measure(folder: Path, num_rows: int, num_files: int, format_name: str) -> dict[str, Any]:
    """Run, kill and resume the job."""
    source = folder / "in"
    source.mkdir()
    for index in range(num_files):
        write_file(source / f"{index:05d}.{format_name}", num_rows // num_files, index)
    whole = run_job(folder, "whole")
    points = [json.loads(line) for line in (folder / "whole" / "_progress.jsonl").read_text().splitlines()]
    kill_at_end(folder, "killed", num_rows)
    resumed = run_job(folder, "killed", "--resume")
    after = json.loads((folder / "killed" / "_summary.json").read_text())
    assert after["num_records"] == num_rows // num_files * num_files, "nothing is lost"
    again = run_job(folder, "killed", "--resume")
    return {
        "rows": num_rows,
        "files": num_files,
        "format": format_name,
        "whole": whole,
        "memory": memory_of(points),
        "resumed": {**resumed, "rows_left": after["num_records"] - after["num_earlier"]},
        "resumed_when_done": again,
    }


def write_file(path: Path, num_rows: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).random((num_rows, WIDTH), dtype=np.float32)
    if path.suffix == ".parquet":
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(numbers.reshape(-1)), WIDTH)
        pyarrow.parquet.write_table(pyarrow.table({"x": column}), path)
    else:
        path.write_text("".join(json.dumps({"x": row}) + "\n" for row in numbers.tolist()))


def command_of(output: str, *flags: str) -> list[str]:
    options = ["--model", "bench_scale:model", "--column", "x", "-o", output, "--batch-size", "4096"]
    return ["infer", "in", *options, "--window", "16384", "--shard-size", "65536", *flags]


def environment() -> dict[str, str]:
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_job(folder: Path, output: str, *flags: str) -> dict[str, float]:
    """Run the job to its end; return what it took, in seconds."""
    times = folder / "times.json"
    code = f"FILE = {str(times)!r}\n{MEASURED}"
    command = [sys.executable, "-c", code, *command_of(output, *flags)]
    ran = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"the job failed:\n{ran.stderr}")
    spent: dict[str, float] = json.loads(times.read_text())
    print(output, *flags, spent, flush=True)
    return spent


def kill_at_end(folder: Path, output: str, num_rows: int) -> None:
    """Kill a job once nine tenths of its shards are in the journal."""
    journal = folder / output / "_journal.jsonl"
    wanted = int(0.9 * num_rows / 65536)
    with subprocess.Popen(
        [sys.executable, "-m", "asyncdp.cli", *command_of(output)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as job:
        while job.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") <= wanted):
            time.sleep(0.05)
        job.kill()


def memory_of(points: list[dict[str, Any]]) -> dict[str, float]:
    """Return the memory of the second tenth and of the last tenth of a job, in MiB."""
    held = [point["memory"] / 2**20 for point in points if point["memory"]]
    tenth = max(len(held) // 10, 1)
    early, late = statistics.median(held[tenth : 2 * tenth] or held), statistics.median(held[-tenth:])
    return {"early_mib": early, "late_mib": late, "growth": late / early, "peak_mib": max(held)}


def report(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    whole, memory, resumed = result["whole"], result["memory"], result["resumed"]
    early, late, load = memory["early_mib"], memory["late_mib"], result["load_at_end"]
    share = {name: whole[name] / whole["seconds"] for name in ("fingerprint", "journal")}
    return f"""# Many small rows

`{result["command"]}`, {result["date"]}, commit {result["commit"]},
{result["machine"]}, Python {result["python"]}, torch {result["torch"]}, load at the end {load:.1f}.

A linear model over {result["rows"]:,} rows in {result["files"]:,} files of {result["format"]}.

| | |
|---|---|
| the whole command | {whole["seconds"]:.1f} s, {result["rows"] / whole["seconds"]:,.0f} rows/s |
| fingerprint, of that | {whole["fingerprint"]:.2f} s, {share["fingerprint"]:.1%} |
| journal, of that | {whole["journal"]:.2f} s, {share["journal"]:.1%} |
| memory, second tenth to last | {early:.0f} MiB to {late:.0f} MiB, x {memory["growth"]:.3f} |
| killed at nine tenths, resumed | {resumed["seconds"]:.1f} s, with {resumed["rows_left"]:,} rows to do |
| resumed when all is done | {result["resumed_when_done"]["seconds"]:.1f} s |
"""


if __name__ == "__main__":
    main()
