"""The calls of an engine: one batch over all lanes, one batch on one lane, a stream of batches."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import Any, Literal

from .._runtime import Lane, Runtime
from .._runtime.lane_runner import StatefulLaneRunner
from .._verbs.batch import Batch
from .adaptive import Adaptive
from .map import BatchStream, map_batches
from .route import EngineLanes, Route
from .tuner import LaneChoice


class Calls:
    """Runs a module over lanes; what an engine and the views of it have in common.

    Args:
        runtime: whose lanes these are.
        route: how calls go over them.
        num_lanes: over how many a call is split.
        is_adaptive: whether that many is only the most.
    """

    def __init__(self, runtime: Runtime, route: Route, num_lanes: int, is_adaptive: bool) -> None:
        self._route = route
        self._num_lanes = num_lanes
        self._runner = EngineLanes(runtime, route)
        self._adaptive = Adaptive(route) if is_adaptive else None

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes that calls are split over."""
        return self._route.lanes

    def _choices(self) -> tuple[LaneChoice, ...]:
        """Return how many lanes each kind of call takes with `num_lanes="auto"`, and why."""
        return () if self._adaptive is None else self._adaptive.choices()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on one batch, split over the lanes.

        Returns, raises: as `asyncdp.data_parallel`.
        """
        batch = Batch(args, kwargs, self._route.dim)
        if len(self._route.lanes) == 1:
            result = await self._route.run_whole(batch)
        elif self._adaptive is not None:
            result = await self._adaptive.call(batch)
        else:
            result = await self._route.run_split(batch, self._num_lanes)
        self._route.count_pass()
        return result

    async def on_one_lane(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on one whole batch, on whichever lane is least busy.

        For many independent batches this beats splitting each of them: keep several calls in flight.

        Returns, raises: as `asyncdp.data_parallel`.
        """
        result = await self._route.run_whole(Batch(args, kwargs, self._route.dim))
        self._route.count_pass()
        return result

    def __asyncdp_lane_runner__(self) -> StatefulLaneRunner:
        """Return what schedulers of whole batches, such as `Batcher`, run them by."""
        return self._runner

    def map(
        self,
        batches: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = True,
        max_in_flight: int | None = None,
        on_error: Literal["raise", "skip", "return"] = "raise",
    ) -> BatchStream:
        """Run a stream of batches, each of them whole on one lane, several at the same time.

        Modes and context variables are those of this call, not of the loop over the results.

        Args:
            batches: arguments of `on_one_lane`: a dict holds keyword arguments, a tuple positional
                ones, anything else is the only argument. Sequences are read on the loop, other
                iterables on a thread, async iterables by awaiting.
            ordered: give results in the order of `batches`; else as they complete.
            max_in_flight: batches read and not yet given back as results. If None, two per lane, or eight
                while a batch takes less than 1 ms.
            on_error: what a batch that raises does: "raise" ends the stream, "skip" leaves it out,
                "return" gives the exception in the result's place. The source's own errors are raised.

        Returns:
            An async iterator of results, also an async context manager. Leaving it early cancels
            what is in flight and closes the source.

        Raises:
            TypeError, ValueError: an argument is none of the above.
        """
        return map_batches(
            self._runner, batches, ordered=ordered, max_in_flight=max_in_flight, on_error=on_error
        )


class EngineView(Calls):
    """An engine whose calls run in one mode; made by `DataParallel.in_mode`.

    It runs on the engine's lanes and ends with them. A `Batcher` takes it like the engine.
    """

    def __init__(
        self, runtime: Runtime, route: Route, num_lanes: int, is_adaptive: bool, training: bool
    ) -> None:
        super().__init__(runtime, route, num_lanes, is_adaptive)
        self.runtime = runtime
        self.module = route.module
        self.training = training

    def __repr__(self) -> str:
        mode = "train" if self.training else "eval"
        return (
            f"<EngineView of {type(self.module).__name__} in {mode} mode: "
            f"{self._route.num_passes} passes done>"
        )
