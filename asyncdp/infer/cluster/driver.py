"""Runs a job over a cluster: carries out what the schedule decides, in one thread of the driver."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import JobError, JobUsageError, MissingExtraError, TooManyBadRecordsError
from ..output.journal import Block
from ..output.output import OutputFolder
from ..readers.pieces import Piece, Planner
from ..records import Failure, Records
from .messages import Opened, PackedError, Setup, Tried
from .placing import Node, Slot, parse_resources, place
from .ray_cluster import Answer, RayCluster
from .schedule import Action, Assign, Finish, GiveUp, Retire, Schedule, Start
from .tally import Tally

_PLANNED_AT_ONCE = 64
_PAUSE = 0.5
_POLLS_PER_SECOND = 200
_NODES_PAUSE = 2.0
_PATIENCE = 30.0
_FAREWELL = 5.0
_DRAIN = 0.2


class Stopped(Exception):
    """Somebody has called `stop`."""


class Driver:
    """Starts actors, hands out blocks, writes the journal.

    Args:
        cluster: where the actors are.
        setup: what they need.
        tally: adds up what they do.
    """

    def __init__(self, cluster: RayCluster, setup: Setup, tally: Tally) -> None:
        self._cluster = cluster
        self._setup = setup
        self._options = setup.options
        self._resources = parse_resources(self._options.ray_resources)
        self._tally = tally
        self._schedule = Schedule(self._options.batch_size)
        self._slots: dict[int, Slot] = {}
        self._num_slots = self._num_first = 0
        self._places: dict[int, int] = {}  # slot of every actor that lives
        self._known_nodes: set[str] = set()
        self._opened: dict[int, Opened] = {}
        self._serving: tuple[Path, Path] | None = None
        self._pieces: dict[int, Any] = {}
        self._blocks: dict[int, Block] = {}
        self._written: list[tuple[int, Block]] = []
        self._tried: Tried | None = None
        self._last_death = ""
        self._is_stopped = False
        self._begun = time.monotonic()
        self._looked = self._looked_at_nodes = self._begun
        self._is_patient = True

    def stop(self) -> None:
        """Let whatever runs here end at once, with `Stopped`; from any thread."""
        self._is_stopped = True
        self._cluster.answers.put(None)

    @property
    def node_names(self) -> tuple[str, ...]:
        """The nodes that have a place for an actor, each once."""
        return tuple(dict.fromkeys(slot.node.name for slot in self._slots.values()))

    def open_first(self) -> tuple[int, Opened]:
        """Start all actors; return number and answer of the first that has loaded the model.

        Raises:
            JobUsageError: the cluster has no place for an actor, or the model cannot be loaded.
        """
        self._add_slots(self._cluster.nodes(), self._options.ray_actors)
        wanted = self._options.ray_actors
        if not self._slots:
            raise JobUsageError(
                f"The cluster has no node with room for {self._options.ray_resources or 'an actor'}",
                "Look at `ray status`, and change --ray-resources.",
            )
        if wanted is not None and len(self._slots) < wanted:
            self._tally.monitor.warn_once(f"the cluster has room for {len(self._slots)} of {wanted} actors")
        self._num_first = len(self._slots)
        while not self._opened:
            self._step(_PAUSE)
            self._look()
        return next(iter(self._opened.items()))

    def try_first(self, actor: int, records: Records) -> Tried:
        """Have an actor run the first batch, and write nothing.

        Raises:
            JobError: the batch does not run, or ends the actor.
        """
        self._cluster.call(actor, "tried", "try_first", records)
        while self._tried is None:
            self._step(_PAUSE)
            if actor not in self._places:
                raise JobError(
                    f"The first batch has ended the process that ran it: {self._last_death}",
                    "Try it by itself, with --limit and without --ray, or with more memory.",
                )
        return self._tried

    def run(
        self, output: OutputFolder, planner: Planner, token: Path, on_block: Callable[[Block], object]
    ) -> None:
        """Run all blocks.

        Args:
            output: where they go.
            planner: cuts the input.
            token: a file in the output folder, which all nodes must see.
            on_block: called for each block that is in the journal.

        Raises:
            JobError: see its subclasses.
            Stopped: by `stop`.
        """
        self._serving = token, planner.first_input
        for actor in self._opened:
            self._serve(actor)
        is_planned = False
        with contextlib.closing(planner.pieces()) as pieces:
            while not is_planned or self._schedule.num_in_flight:
                is_planned = is_planned or self._plan(pieces)
                has_more = not is_planned and self._schedule.num_wanted > 0
                self._step(0.0 if has_more else _PAUSE)
                self._commit(output, on_block)
                self._look()
                self._check_num_bad(output, on_block)
        self._close()

    # --- what happens

    def _step(self, seconds: float) -> None:
        """Take what has come, waiting for the first of it."""
        answers = self._cluster.answers
        with contextlib.suppress(queue.Empty):
            self._take(answers.get(timeout=seconds) if seconds else answers.get_nowait())
            for _ in range(_PLANNED_AT_ONCE):
                self._take(answers.get_nowait())

    def _take(self, answer: Answer | Exception | None) -> None:
        if self._is_stopped:
            raise Stopped
        if isinstance(answer, Exception):
            raise answer
        if answer is None or answer.actor not in self._places:
            return
        if answer.died is not None:
            self._on_died(answer.actor, answer.died)
        elif isinstance(answer.value, PackedError):
            self._on_error(answer.actor, answer.value)
        elif answer.tag == "open":
            self._on_opened(answer.actor, answer.value)
        elif answer.tag == "tried":
            self._tried = answer.value
        elif answer.tag == "counts":
            self._tally.note(answer.actor, answer.value)
        elif isinstance(answer.tag, int):
            self._on_run(answer.actor, answer.tag, answer.value)

    def _on_opened(self, actor: int, opened: Opened) -> None:
        first = next(iter(self._opened.values()), opened)
        for name, digest in opened.print.digests.items():
            if first.print.digests.get(name) != digest:
                raise JobUsageError(
                    f"Node {self._node_of(actor)} has another {name} than the nodes before",
                    "All nodes must run the same: copy the files anew, and seed what draws weights.",
                )
        self._opened[actor] = opened
        self._tally.start(actor, self._node_of(actor))
        self._tally.apply()
        if self._serving is not None:
            self._serve(actor)

    def _serve(self, actor: int) -> None:
        assert self._serving is not None, "there is an output folder"
        self._cluster.call(actor, "serve", "serve", *self._serving)
        self._do(self._schedule.on_ready(actor))

    def _on_run(self, actor: int, block: int, written: Block | None) -> None:
        if written is not None:
            self._blocks[block] = written
        for action in self._schedule.on_done(actor, block):
            if isinstance(action, Finish):
                self._written.append((actor, self._blocks.pop(block)))
                del self._pieces[block]
            else:
                self._do([action])

    def _on_died(self, actor: int, why: str) -> None:
        slot = self._places.pop(actor)
        self._last_death = f"on node {self._slots[slot].node.name}, {why}"
        self._tally.monitor.warn_once(f"an actor has ended, what it had runs again: {self._last_death}")
        self._opened.pop(actor, None)
        self._tally.end(actor)
        self._cluster.kill(actor)
        self._do(self._schedule.on_died(actor))

    def _on_error(self, actor: int, packed: PackedError) -> None:
        """End the job; but a node that has joined it later is only left out."""
        is_about_node = isinstance(packed.error, JobUsageError | MissingExtraError)
        if is_about_node and actor >= self._num_first:
            self._on_died(actor, str(packed.error))
        else:
            raise packed.unpack(self._node_of(actor) if is_about_node else None)

    def _node_of(self, actor: int) -> str:
        return self._slots[self._places[actor]].node.name

    # --- what is done about it

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                self._places[action.actor] = action.slot
                self._cluster.start(action.actor, self._slots[action.slot], self._setup)
            elif isinstance(action, Assign):
                piece = self._pieces[action.work.block]
                self._cluster.call(action.actor, action.work.block, "run", action.work, piece)
            elif isinstance(action, Retire):
                self._retire(action.slot)
            elif isinstance(action, GiveUp):
                first = action.block * self._options.shard_size
                raise JobError(
                    f"The shard that begins with record {first} ends every process that runs it, though none "
                    "of its records does so alone",
                    "Give more memory by --ray-resources, or a smaller --shard-size or --window.",
                )

    def _retire(self, slot: int) -> None:
        name = self._slots.pop(slot).node.name
        self._tally.monitor.warn_once(f"node {name} is left out: {self._last_death}")
        self._check_slots()

    def _check_slots(self) -> None:
        if not self._slots:
            raise JobError(
                f"No node is left to run on; the last one to end: {self._last_death}",
                "Look at the logs of Ray, then continue with --resume.",
            )

    def _plan(self, pieces: Iterator[tuple[int, Piece]]) -> bool:
        """Hand out blocks while there is room; return whether there are no more."""
        for _ in range(min(self._schedule.num_wanted, _PLANNED_AT_ONCE)):
            planned = next(pieces, None)
            if planned is None:
                return True
            index, piece = planned
            # Records travel once, and are kept until some actor has done with them.
            self._pieces[index] = piece if piece.records is None else self._cluster.put(piece)
            self._do(self._schedule.plan(index, piece.num_records))
        return False

    def _commit(self, output: OutputFolder, on_block: Callable[[Block], object]) -> None:
        if self._written:
            output.take_blocks([block for _, block in self._written])
            for actor, block in self._written:
                self._tally.finish(actor, block)
                on_block(block)
            self._written = []
            self._tally.apply()

    def _look(self) -> None:
        """Ask how far the actors are, and which nodes live, now and then."""
        now = time.monotonic()
        if now - self._looked >= max(_PAUSE, len(self._opened) / _POLLS_PER_SECOND):
            self._looked = now
            self._tally.apply()
            for actor in self._opened:
                self._cluster.call(actor, "counts", "counts")
        if now - self._looked_at_nodes >= _NODES_PAUSE:
            self._looked_at_nodes = now
            self._look_at_nodes()
        if self._is_patient and self._serving is None and now - self._begun > _PATIENCE:
            self._is_patient = False
            self._tally.monitor.warn_once(
                "no actor is ready yet: the model takes long to load, or all is taken, see `ray status`"
            )

    def _look_at_nodes(self) -> None:
        nodes = self._cluster.nodes()
        living = {node.id for node in nodes}
        for number, slot in list(self._slots.items()):
            if slot.node.id not in living:
                self._last_death = f"node {slot.node.name} is gone"
                self._lose(number)
        new = [node for node in nodes if node.id not in self._known_nodes]
        wanted = self._options.ray_actors
        if new and (wanted is None or len(self._slots) < wanted):
            self._add_slots(new, None if wanted is None else wanted - len(self._slots))
        self._check_slots()

    def _lose(self, number: int) -> None:
        for actor in [actor for actor, slot in self._places.items() if slot == number]:
            del self._places[actor]
            self._opened.pop(actor, None)
            self._tally.end(actor)
            self._cluster.kill(actor)
        del self._slots[number]
        self._do(self._schedule.lose_slot(number))

    def _add_slots(self, nodes: Sequence[Node], num_actors: int | None) -> None:
        self._known_nodes.update(node.id for node in nodes)
        on_gpus = "cpu" not in (self._options.devices or "cuda")
        for slot in place(nodes, num_actors=num_actors, resources=self._resources, on_gpus=on_gpus):
            number = self._num_slots
            self._num_slots += 1
            self._slots[number] = slot
            self._do(self._schedule.add_slot(number))

    # --- the end

    def _check_num_bad(self, output: OutputFolder, on_block: Callable[[Block], object]) -> None:
        monitor, limit = self._tally.monitor, self._options.max_errors
        if limit is None or monitor.num_all_bad <= limit:
            return
        left: list[Failure] = []
        if self._options.on_error == "record":
            left = [bad for _, some in self._ask("failures_left") for bad in some]
        self._count()
        self._step(_DRAIN)
        self._commit(output, on_block)
        self._cluster.kill_all()
        done, size = output.finished, self._options.shard_size
        # Written meanwhile, or by an actor that had no time left to tell.
        output.write_unfinished([bad for bad in left if bad.position // size not in done], others_wrote=True)
        raise TooManyBadRecordsError(monitor.num_all_bad, limit, monitor.last_error)

    def _close(self) -> None:
        """Let the actors end by themselves, as long as that is quick; take what they counted."""
        self._ask("close")
        self._count()

    def _count(self) -> None:
        """Ask the actors once more what they have counted."""
        for actor, counts in self._ask("counts"):
            self._tally.note(actor, counts)
        self._tally.apply()

    def _ask(self, method: str) -> list[tuple[int, Any]]:
        """Call a method of all actors; return what those say that answer soon, by actor."""
        for actor in self._opened:
            self._cluster.call(actor, method, method)
        found: dict[int, Any] = {}
        deadline = time.monotonic() + _FAREWELL
        with contextlib.suppress(queue.Empty):
            while len(found) < len(self._opened):
                answer = self._cluster.answers.get(timeout=max(deadline - time.monotonic(), 0.0))
                if isinstance(answer, Answer) and answer.tag == method and answer.died is None:
                    found[answer.actor] = answer.value
                else:
                    self._take(answer)
        return list(found.items())
