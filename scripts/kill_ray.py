"""Kill the actors, a raylet and the driver of jobs over a Ray cluster; part of kill_infer.py.

The cluster has two raylets on this machine. The one of the head stays, since Ray's own tables are there; the
other is killed with all of its processes and started anew.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_KINDS = ("actors", "raylets", "drivers")
_NUM_CPUS = 1


class Victims:
    """A cluster, a driver beside it, and ways to kill each of them.

    Args:
        command: of the driver, without the address.
        environment: that Ray's processes and the driver get.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        os.environ.update(environment)
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=self._node())
        self._other = self._cluster.add_node(**self._node())
        self._command = [*command, "--ray", self._cluster.address]
        self._driver: subprocess.Popen[bytes] | None = None

    def _node(self) -> dict[str, object]:
        return {"num_cpus": _NUM_CPUS, "include_dashboard": False, "object_store_memory": 100 << 20}

    def start_driver(self, output: Path) -> None:
        """Begin a job, or continue it."""
        log = open(output.with_suffix(".log"), "ab")  # noqa: SIM115  the process has it
        self._driver = subprocess.Popen([*self._command, "-o", str(output)], stdout=log, stderr=log)

    def ended(self) -> int | None:
        """Return the exit code of the driver, None while it runs."""
        assert self._driver is not None
        return self._driver.poll()

    def kill(self, kind: str, dice: random.Random) -> bool:
        """Kill something at once; return whether there was anything."""
        if kind == "drivers":
            assert self._driver is not None
            self._driver.kill()
            self._driver.wait()
            return True
        if kind == "raylets":
            self._cluster.remove_node(self._other, allow_graceful=False)
            self._other = self._cluster.add_node(**self._node())
            return True
        actors = [each for each in psutil.process_iter(["cmdline"]) if self._is_actor(each)]
        if actors:
            dice.choice(actors).send_signal(signal.SIGKILL)
        return bool(actors)

    def _is_actor(self, process: psutil.Process) -> bool:
        if not (process.info["cmdline"] or [""])[0].startswith("ray::JobActor"):
            return False
        try:
            raylets = [ancestor.pid for ancestor in process.parents()]
        except psutil.Error:
            return False
        return any(pid in raylets for pid in self._own_pids())

    def _own_pids(self) -> set[int]:
        nodes = self._cluster.list_all_nodes()
        return {info.process.pid for node in nodes for info in node.all_processes.get("raylet", ())}

    def close(self) -> None:
        """End all processes."""
        if self._driver is not None and self._driver.poll() is None:
            self._driver.kill()
            self._driver.wait()
        self._cluster.shutdown()


def hunt_on_ray(
    folder: Path,
    source: Path,
    num_kills: int,
    dice: random.Random,
    options: list[str],
    check: Callable[[Path], None],
) -> dict[str, dict[str, int]]:
    """Kill so many of each kind, at random moments of jobs that are continued until they are done.

    Args:
        folder: for the outputs.
        source: the input.
        num_kills: of each kind.
        dice: choose moments and victims.
        options: of the job.
        check: fails unless an output is what an undisturbed run on one machine gives.
    """
    scripts = str(Path(__file__).parent)
    paths = [str(Path(__file__).parents[1]), scripts, os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "asyncdp.cli", "infer", str(source), *options, "--resume"]
    victims = Victims(command, environment)
    found = {}
    try:
        for kind in _KINDS:
            found[kind] = _hunt(victims, kind, folder, num_kills, dice, check)
    finally:
        victims.close()
    return found


def _hunt(
    victims: Victims,
    kind: str,
    folder: Path,
    num_kills: int,
    dice: random.Random,
    check: Callable[[Path], None],
) -> dict[str, int]:
    kills, jobs, restarts, begun = 0, 0, 0, time.monotonic()
    while kills < num_kills:
        output = folder / f"{kind}-{jobs}"
        victims.start_driver(output)
        pause = _pause(kind, dice)
        while (code := victims.ended()) is None or code != 3:
            if code is not None:
                if code != -signal.SIGKILL:
                    raise SystemExit(f"the driver ended with {code}: see {output.with_suffix('.log')}")
                restarts += 1
                victims.start_driver(output)
            if kills < num_kills and time.monotonic() > pause:
                kills += victims.kill(kind, dice)
                pause = _pause(kind, dice)
            time.sleep(0.01)
        check(output)
        jobs += 1
        print(f"{kind}: {kills} kills, {jobs} jobs, {time.monotonic() - begun:.0f} s", flush=True)
    return {"kills": kills, "jobs": jobs, "continued": restarts, "lost": 0, "repeated": 0}


def _pause(kind: str, dice: random.Random) -> float:
    # Drivers and nodes take seconds to come up: some are killed meanwhile, most later.
    return time.monotonic() + dice.uniform(0.0, 5.0 if kind == "actors" else 12.0)
