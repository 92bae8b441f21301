"""Kill an inference job at random moments, resume it each time, and compare its output.

    .venv/bin/python scripts/kill_infer.py --kills 100
    .venv/bin/python scripts/kill_infer.py --kills 100 --store    # into a server that speaks as S3 does
    .venv/bin/python scripts/kill_infer.py --kills 50 --ray       # of each: actors, raylets, drivers

Every attempt is a forked process that gets SIGKILL after a random time. A job that reaches its end is
compared with one that nobody disturbed, file by file and byte by byte, and the ids in its shards are counted;
then the next job starts, until all kills are spent.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import machine
import pyarrow.parquet
import torch
from kill_ray import hunt_on_ray
from torch import nn

from asyncdp.infer import InferOptions, Job
from asyncdp.infer.output.journal import load_journal
from asyncdp.infer.places import find_all, open_place, place_of

BAD_FROM, BAD_EVERY = 500, 997


RAY_SHARD = 32


class Scaled(nn.Module):
    """x [batch, 4] -> x times two, and its sum."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return both."""
        return {"double": x * 2, "sum": x.sum(1)}


class Slowly(Scaled):
    """The same, as slow as a model of some size."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return both."""
        time.sleep(0.02)
        return super().forward(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--records", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--store", action="store_true", help="write into a store instead of a disk")
    parser.add_argument("--ray", action="store_true", help="over a Ray cluster of two raylets")
    parser.add_argument("--keep", type=Path, default=None, help="add the result to a file of JSON")
    chosen = parser.parse_args()
    seed = chosen.seed if chosen.seed is not None else random.randrange(2**32)
    print(f"seed {seed}", flush=True)
    sys.modules["kill_infer_models"] = sys.modules["__main__"]
    if chosen.ray:
        with tempfile.TemporaryDirectory() as folder:
            keep(chosen, "ray", seed, on_ray(Path(folder), chosen.kills, chosen.records, random.Random(seed)))
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        outputs = stack.enter_context(store()) if chosen.store else folder
        found = hunt(Path(folder), outputs, chosen.kills, chosen.records, random.Random(seed))
    keep(chosen, "store" if chosen.store else "disk", seed, found)


def keep(chosen: argparse.Namespace, name: str, seed: int, found: dict[str, Any]) -> None:
    if chosen.keep is not None:
        results = json.loads(chosen.keep.read_text()) if chosen.keep.exists() else {}
        results[name] = {**machine.origin(), "seed": seed, **found}
        chosen.keep.write_text(json.dumps(results, indent=1) + "\n")


def on_ray(folder: Path, num_kills: int, num_records: int, dice: random.Random) -> dict[str, Any]:
    source = write_input(folder, num_records)
    assert attempt(lambda: run(source, str(folder / "whole"), RAY_SHARD)), "the undisturbed run failed"
    options = ["--model", "kill_infer:Slowly", "--column", "x", "--on-error", "record"]
    options += ["--batch-size", "8", "--window", "32", "--shard-size", str(RAY_SHARD)]

    def check(output: Path) -> None:
        assert attempt(lambda: compare(str(folder / "whole"), str(output), num_records))

    return {"records": num_records, **hunt_on_ray(folder, source, num_kills, dice, options, check)}


@contextlib.contextmanager
def store() -> Iterator[str]:
    """Run a server in a process of its own; yield the URL of a bucket."""
    import boto3

    port = 5000 + os.getpid() % 20_000
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y"}.items():
        os.environ[f"AWS_{name}"] = value
    logging.getLogger("botocore").setLevel(logging.ERROR)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                boto3.client("s3").create_bucket(Bucket="kills")
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
        yield "s3://kills"
    finally:
        server.terminate()
        server.wait()


def hunt(folder: Path, outputs: str, num_kills: int, num_records: int, dice: random.Random) -> dict[str, int]:
    source = write_input(folder, num_records)
    whole = f"{outputs}/whole"
    started = time.monotonic()
    assert attempt(lambda: run(source, whole)), "the undisturbed run failed"
    longest = time.monotonic() - started
    kills, jobs, midway = 0, 0, 0
    while kills < num_kills:
        output = f"{outputs}/job-{jobs}"
        while not attempt(
            lambda: run(source, output),  # noqa: B023
            dice.uniform(0.0, longest) if kills < num_kills else None,
        ):
            kills += 1
            midway += attempt(lambda: check_midway(output, num_records), may_fail=True)  # noqa: B023
        # In processes of their own, since a driver's threads do not live on in a forked one.
        assert attempt(lambda: compare(whole, output, num_records))  # noqa: B023
        jobs += 1
        print(f"{kills} kills, {jobs} jobs", flush=True)
    print(f"{kills} kills ({midway} of them midway), {jobs} jobs finished, every output identical")
    return {"kills": kills, "midway": midway, "jobs": jobs, "records": num_records, "lost": 0, "repeated": 0}


def write_input(folder: Path, num_records: int) -> Path:
    source = folder / "input.jsonl"
    with open(source, "w") as file:
        for index in range(num_records):
            # A few records are bad, so that error shards are part of what must survive.
            is_bad = index % BAD_EVERY == BAD_FROM
            file.write(("bad" if is_bad else json.dumps({"x": [index, index % 7, 1.5, -index]})) + "\n")
    return source


def check_midway(output: str, num_records: int) -> None:
    blocks = load_journal(place_of(output)).blocks.values()
    assert 0 < sum(block.num_records for block in blocks) < num_records


def attempt(work: Callable[[], None], seconds: float | None = None, *, may_fail: bool = False) -> bool:
    """Do some work in a forked process, kill it after some time; return whether it ended well by itself."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            if not may_fail:
                traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code == 1 and not may_fail:
                raise SystemExit("a process failed of itself")
            return code == 0
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.001)


def run(source: Path, output: str, shard_size: int = 64) -> None:
    options = InferOptions(
        (str(source),),
        "kill_infer_models:Scaled",
        place_of(output),
        columns=("x",),
        devices="cpu*2",
        batch_size=8,
        window=32,
        shard_size=shard_size,
        on_error="record",
        resume=True,
    )
    anyio.run(Job(options).run)


def compare(whole: str, output: str, num_records: int) -> None:
    def contents(folder: str) -> dict[str, bytes]:
        found = [file.path for file in find_all(place_of(folder))]
        names = ("part-", "_errors-", ".tmp-")
        return {path.name: open_place(path).read() for path in found if path.name.startswith(names)}

    shards = contents(output)
    if contents(whole) != shards:
        raise SystemExit(f"{output} differs from an undisturbed run")
    tables = [
        pyarrow.parquet.read_table(io.BytesIO(data), columns=["id"])
        for name, data in shards.items()
        if name.startswith("part-")
    ]
    ids = Counter(identity for table in tables for identity in table["id"].to_pylist())
    if ids != Counter(index for index in range(num_records) if index % BAD_EVERY != BAD_FROM):
        raise SystemExit(f"{output} has lost or repeated records")
    state = load_journal(place_of(output))
    if state.num_records != num_records or sum(b.num_records for b in state.blocks.values()) != num_records:
        raise SystemExit(f"the journal of {output} counts other records")


if __name__ == "__main__":
    main()
