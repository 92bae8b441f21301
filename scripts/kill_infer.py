"""Kill an inference job at random moments, resume it each time, and compare its output.

    .venv/bin/python scripts/kill_infer.py --kills 100

Every attempt is a forked process that gets SIGKILL after a random time. A job that reaches its end is
compared with one that nobody disturbed, file by file and byte by byte; then the next job starts, until all
kills are spent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import anyio
import torch
from torch import nn

from asyncdp.infer import InferOptions, Job
from asyncdp.infer.output.journal import load_journal


class Scaled(nn.Module):
    """x [batch, 4] -> x times two, and its sum."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return both."""
        return {"double": x * 2, "sum": x.sum(1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--records", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=None)
    chosen = parser.parse_args()
    seed = chosen.seed if chosen.seed is not None else random.randrange(2**32)
    print(f"seed {seed}")
    sys.modules["kill_infer_models"] = sys.modules["__main__"]
    with tempfile.TemporaryDirectory() as folder:
        hunt(Path(folder), chosen.kills, chosen.records, random.Random(seed))


def hunt(folder: Path, num_kills: int, num_records: int, dice: random.Random) -> None:
    source = folder / "input.jsonl"
    with open(source, "w") as file:
        for index in range(num_records):
            # A few records are bad, so that error shards are part of what must survive.
            entry = "bad" if index % 997 == 500 else json.dumps({"x": [index, index % 7, 1.5, -index]})
            file.write(entry + "\n")
    started = time.monotonic()
    assert attempt(source, folder / "whole", None) == 0, "the undisturbed run failed"
    longest = time.monotonic() - started
    kills, jobs, midway = 0, 0, 0
    while kills < num_kills:
        output = folder / f"job-{jobs}"
        while attempt(source, output, dice.uniform(0.0, longest) if kills < num_kills else None) != 0:
            kills += 1
            midway += is_midway(output, num_records)
        compare(folder / "whole", output, num_records)
        shutil.rmtree(output)
        jobs += 1
    print(f"{kills} kills ({midway} of them midway), {jobs} jobs finished, every output identical")


def is_midway(output: Path, num_records: int) -> bool:
    if not (output / "_journal.jsonl").exists():
        return False
    blocks = load_journal(output).blocks.values()
    return 0 < sum(block.num_records for block in blocks) < num_records


def attempt(source: Path, output: Path, seconds: float | None) -> int:
    """Run the job in a forked process, kill it after some time; return 0 when it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            run(source, output)
        except BaseException as error:
            print(f"the job failed: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if os.waitstatus_to_exitcode(status) == 1:
                raise SystemExit("a job failed of itself")
            return 0
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 1
        time.sleep(0.001)


def run(source: Path, output: Path) -> None:
    options = InferOptions(
        (str(source),),
        "kill_infer_models:Scaled",
        output,
        columns=("x",),
        devices="cpu*2",
        batch_size=8,
        window=32,
        shard_size=64,
        on_error="record",
        resume=True,
    )
    anyio.run(Job(options).run)


def compare(whole: Path, output: Path, num_records: int) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        paths = [*folder.glob("part-*"), *folder.glob("_errors-*"), *folder.glob(".tmp-*")]
        return {path.name: path.read_bytes() for path in paths}

    if contents(whole) != contents(output):
        raise SystemExit(f"{output} differs from an undisturbed run")
    state = load_journal(output)
    if state.num_records != num_records or sum(b.num_records for b in state.blocks.values()) != num_records:
        raise SystemExit(f"the journal of {output} counts other records")


if __name__ == "__main__":
    main()
