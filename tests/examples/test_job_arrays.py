"""The files for Slurm and Kubernetes split a job into parts that make up the whole."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

from asyncdp.cli.app import app

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SBATCH = EXAMPLES / "infer_array.sbatch"
JOB = EXAMPLES / "infer_job.yaml"

# In the place of an encoder: of interest is who does what.
MODEL = """
import torch

class Lengths(torch.nn.Module):
    def forward(self, texts):
        return torch.tensor([len(text) for text in texts])
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Run a script with variables of the environment; return what it tells `asyncdp` to do."""
    command = tmp_path / "bin" / "asyncdp"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def run(*script: str, **variables: str) -> list[str]:
        environment = {**os.environ, **variables}
        return subprocess.check_output(script, env=environment, text=True).splitlines()

    return run


def of_slurm(told: Callable[..., list[str]], *tasks: str) -> list[list[str]]:
    """Return what some tasks of the array do."""
    others = {"SLURM_CPUS_PER_TASK": "8", "SLURM_ARRAY_TASK_COUNT": str(len(tasks))}
    return [told("bash", str(SBATCH), SLURM_ARRAY_TASK_ID=task, **others) for task in tasks]


def test_the_tasks_of_an_array_make_up_the_whole(told: Callable[..., list[str]]) -> None:
    """Each does a part, those that are submitted once more do theirs again, and `merge` finds all records."""
    ((first, last),) = re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", SBATCH.read_text(), re.M)
    table = pyarrow.table({"text": ["one", "two three", "four", "one two"] * 5})
    pyarrow.parquet.write_table(table, "texts.parquet")
    Path("lengths.py").write_text(MODEL)
    tasks = of_slurm(told, *map(str, range(int(first), int(last) + 1))) + of_slurm(told, "3", "5")
    for arguments in tasks:
        text = shlex.join(arguments).replace("./minilm --task embed", "lengths:Lengths")
        done = CliRunner().invoke(app, [*shlex.split(text), "--shard-size", "2"])
        assert done.exit_code == 0, done.output
    (merge,) = re.findall(r"^# +asyncdp (merge .*)$", SBATCH.read_text(), re.M)
    parts = sorted(map(str, Path().glob("vectors/part-*")))
    merged = CliRunner().invoke(app, shlex.split(merge.replace("vectors/part-*", shlex.join(parts))))
    assert merged.exit_code == 0, merged.output
    assert pyarrow.dataset.dataset("whole").to_table()["id"].to_pylist() == list(range(20))


def test_the_pods_of_a_job_do_what_the_tasks_of_an_array_do(told: Callable[..., list[str]]) -> None:
    """The pod of index k has the command of task k + 1, but for the name of its folder."""
    spec: Any = yaml.safe_load(JOB.read_text())["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    script = [*container["command"], *container["args"]]
    for index in range(spec["completions"]):
        pod = told(*script, JOB_COMPLETION_INDEX=str(index), **given)
        (task,) = of_slurm(told, str(index + 1))
        assert pod == [each.replace(f"part-{index + 1}", f"part-{index}") for each in task]


def test_slurm_and_the_shell_can_read_the_script() -> None:
    """It is one for bash, and its options come before its first command, where Slurm looks for them."""
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    lines = SBATCH.read_text().splitlines()
    first_command = next(place for place, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(place for place, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command
