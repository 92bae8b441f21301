"""The example that trains in groups of torchft loses a step when a group dies, and no more."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchft", reason="needs torchft, whose wheels are for Linux and Python 3.11 - 3.13")
if version("torchft").startswith("0.1."):
    pytest.skip("needs torchft 0.2, which needs torch 2.7", allow_module_level=True)

NUM_STEPS = 100
SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "digits_torchft.py"
END = re.compile(
    r"group (\d) ends: (?P<taken>\d+) taken, (?P<lost>\d+) lost, "
    r"accuracy (?P<accuracy>[\d.]+), weights (?P<weights>\w+)"
)


def lines_of(*options: str) -> Iterator[tuple[int, str]]:
    """Run the example; yield its process's id with every line that it prints."""
    command = [sys.executable, str(SCRIPT), f"--steps={NUM_STEPS}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            yield launcher.pid, line.strip()
    assert launcher.returncode == 0


def kill_group(launcher: int, number: int) -> None:
    """Kill the process of one of the groups that the example has started."""
    for child in psutil.Process(launcher).children():
        if f"--group={number}" in child.cmdline():
            child.kill()


def ends(lines: list[str]) -> dict[int, re.Match[str]]:
    """Return how each group that lived to the end tells that it ended."""
    return {int(end[1]): end for line in lines if (end := END.fullmatch(line))}


@pytest.mark.timeout(120)
def test_a_group_loses_no_more_than_a_step_when_the_other_one_dies() -> None:
    """It takes the step in which the other one died again, alone and with all rows, and learns as well."""
    die_at = random.Random(0).randrange(1, NUM_STEPS)
    lines = [line for _, line in lines_of(f"--die-at={die_at}")]
    assert lines.count("group 1 ended with -9") == 1
    steps = [line for line in lines if line.startswith("group 0 has taken step")]
    expected = [
        f"group 0 has taken step {step} with {60 if step < die_at else 120} rows" for step in range(NUM_STEPS)
    ]
    assert steps == expected
    assert [line for line in lines if " loses " in line] == [f"group 0 loses step {die_at}"]
    assert [*ends(lines)] == [0]
    end = ends(lines)[0]
    assert (int(end["taken"]), int(end["lost"])) == (NUM_STEPS, 1)
    assert float(end["accuracy"]) > 0.85


@pytest.mark.timeout(120)
def test_a_group_that_comes_back_heals() -> None:
    """Killed at any moment and started again, it ends with the very weights of the group that lived on."""
    lines = []
    for launcher, line in lines_of("--restarts=1", "--min-groups=2"):
        lines.append(line)
        if line.startswith("group 1 has taken step 4 "):
            kill_group(launcher, 1)
    assert lines.count("group 1 ended with -9 and is started again") == 1
    restarted = lines.index("group 1 ended with -9 and is started again")
    healed = [int(line.split()[-1]) for line in lines[restarted:] if line.startswith("group 1 heals at step")]
    assert len(healed) == 1
    assert 5 <= healed[0] < NUM_STEPS
    survivor, other = ends(lines)[0], ends(lines)[1]
    assert int(survivor["taken"]) == NUM_STEPS
    assert int(survivor["lost"]) <= 1
    assert (int(other["taken"]), int(other["lost"])) == (NUM_STEPS - healed[0], 0)
    assert survivor["weights"] == other["weights"]
    assert float(survivor["accuracy"]) > 0.85
