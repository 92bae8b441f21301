"""The only file that talks to Ray: nodes, actors, and what they answer."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...errors import JobError, JobUsageError, MissingExtraError
from .actor import JobActor
from .messages import Setup
from .placing import Node, Slot

_CONNECT_SECONDS = 10.0


class Answer(NamedTuple):
    """What has become of a call.

    Attributes:
        tag: what the caller gave to know it by.
        died: why the actor is gone, None while it lives.
    """

    actor: int
    tag: Any
    value: Any
    died: str | None = None


class RayCluster:
    """Actors by number, and one queue for all of their answers; the caller owns the connection.

    Attributes:
        answers: gets an `Answer` for each call, None from `wake`.
        is_new: whether the cluster was started for this job, on this machine.
    """

    def __init__(self, *, is_new: bool = False) -> None:
        import ray

        self._ray = ray
        self._class = ray.remote(JobActor)
        self._actors: dict[int, Any] = {}
        self.answers: queue.SimpleQueue[Answer | Exception | None] = queue.SimpleQueue()
        self.is_new = is_new

    def nodes(self) -> list[Node]:
        """Return the nodes that live.

        Raises:
            JobError: the cluster does not answer.
        """
        try:
            found = [entry for entry in self._ray.nodes() if entry["Alive"]]
        except Exception as error:  # of several classes
            raise JobError(
                f"The cluster does not answer: {_brief(error)}",
                "Start it again, then continue with --resume.",
            ) from error
        names = Counter(entry["NodeManagerAddress"] for entry in found)
        return [Node(entry["NodeID"], _name(entry, names), entry["Resources"]) for entry in found]

    def start(self, actor: int, slot: Slot, setup: Setup) -> None:
        """Start an actor, whose first answer is that of `open`."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        amounts = dict(slot.resources)
        self._actors[actor] = self._class.options(
            num_cpus=amounts.pop("CPU", 0),
            num_gpus=amounts.pop("GPU", 0),
            resources=amounts,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node.id, soft=False),
            max_restarts=0,
            max_task_retries=0,
        ).remote(setup)
        self.call(actor, "open", "open")

    def call(self, actor: int, tag: Any, method: str, *args: Any) -> None:
        """Call a method of an actor; the answer comes into the queue with the tag."""
        handle = self._actors.get(actor)
        if handle is None:
            return
        future = getattr(handle, method).remote(*args).future()
        future.add_done_callback(lambda done: self.answers.put(self._answer(actor, tag, done)))

    def _answer(self, actor: int, tag: Any, done: Any) -> Answer | Exception:
        try:
            return Answer(actor, tag, done.result())
        except self._ray.exceptions.RayTaskError as error:
            return error  # a mistake in our own code
        except Exception as error:  # the actor is gone, or cannot be reached
            return Answer(actor, tag, None, _brief(error))

    def put(self, value: Any) -> Any:
        """Keep a value where actors fetch it; what stands for it goes in the value's place."""
        return self._ray.put(value)

    def kill(self, actor: int) -> None:
        """End an actor at once."""
        handle = self._actors.pop(actor, None)
        if handle is not None:
            with contextlib.suppress(Exception):  # Ray may be gone itself
                self._ray.kill(handle, no_restart=True)

    def kill_all(self) -> None:
        """End all actors at once."""
        for actor in list(self._actors):
            self.kill(actor)


@contextlib.contextmanager
def connected(address: str) -> Iterator[RayCluster]:
    """Connect to a cluster; at the end all actors are ended, and a connection made here is closed.

    Args:
        address: of a cluster; `auto` for the one that `RAY_ADDRESS` names or that runs on this machine, and
            a new one on this machine if there is none; `local` for a new one.

    Raises:
        MissingExtraError: Ray is not installed.
        JobUsageError: there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--ray", "ray", "ray") from error
    if ray.is_initialized():
        if address not in ("auto", ray.get_runtime_context().gcs_address):
            raise JobUsageError(
                f"This process is connected to another cluster than {address}",
                "Call ray.shutdown() first, or give --ray auto for the one in use.",
            )
        with _actors_of(RayCluster()) as cluster:
            yield cluster
        return
    with _silent_listener():
        with _quiet():
            is_new = _connect(ray, address)
        try:
            with _actors_of(RayCluster(is_new=is_new)) as cluster:
                yield cluster
        finally:
            with _quiet():
                ray.shutdown()


@contextlib.contextmanager
def _actors_of(cluster: RayCluster) -> Iterator[RayCluster]:
    try:
        yield cluster
    finally:
        cluster.kill_all()


def _connect(ray: Any, address: str) -> bool:
    """Connect; return whether that started a cluster."""
    options = {"log_to_driver": False, "configure_logging": False}
    named = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if named != "local":
        try:
            _check_answers(named)
            ray.init(named, **options)
            return False
        except Exception as error:  # of many classes, those of its network library too
            if named != "auto":
                raise JobUsageError(
                    f"There is no Ray cluster at {named}: {_brief(error)}",
                    "Check the address, that the cluster is up, and that it has this version of Ray "
                    f"({ray.__version__}); `ray status` tells.",
                ) from error
    ray.init("local", include_dashboard=False, **options)
    return True


def _check_answers(address: str) -> None:
    """Fail soon where nothing listens: Ray would try for minutes.

    Raises:
        OSError: nothing does.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's notes to people who operate clusters off the terminal; its errors stay."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _silent_listener() -> Iterator[None]:
    """Keep what raylets tell of processes that ended off standard output.

    A thread of Ray 2.59 and 2.60 prints it there, whatever `log_to_driver` says, where it would stand
    between the lines of --json; the job tells of ended actors itself.
    """
    import ray._private.worker as module

    printing = getattr(module, "print_to_stdstream", None)
    if printing is None:
        yield
        return
    setattr(module, "print_to_stdstream", lambda *_, **__: None)  # noqa: B010  mypy knows no such name
    try:
        yield
    finally:
        setattr(module, "print_to_stdstream", printing)  # noqa: B010


def _name(entry: dict[str, Any], names: Counter[str]) -> str:
    address = str(entry["NodeManagerAddress"])
    return address if names[address] == 1 else f"{address}/{entry['NodeID'][:6]}"


def _brief(error: BaseException) -> str:
    """Return what an error of Ray's says of its cause, without the advice that follows."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if "exit detail" in line or "memory" in line.lower()), None)
    text = detail or (lines[0] if lines else "")
    text = text.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0].rstrip(".")
    return f"{type(error).__name__}: {text}"[:300]
