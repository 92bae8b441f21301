"""Many tasks call with one sample each; batches run on the lanes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from .._checks import as_optional_seconds, as_seconds, check_counts, check_functions, is_number, shown
from .._runtime import Runtime, check_runtime
from .._runtime.hangs import grace_of
from ..errors import BatcherClosedError, QueueFullError
from .call import Call, Request
from .collate import Collate, Padding, Split, Stack, StatedSample, Steps, unbind
from .dispatcher import Dispatcher
from .queue import BatchQueue
from .shapes import checked_shapes
from .slots import capture_of, open_slots
from .statistics import BatcherStatistics, Recorder, check_name

_MOST_IN_FLIGHT = 1 << 16


class Batcher:
    """Runs the samples of many tasks in batches, and hands each task its own result.

    An async context manager, on asyncio or trio. A batch leaves the moment a lane is free. When one
    raises, parts of it run again, so that only the calls with bad samples fail: a good sample may run
    more than once.

    Args:
        engine: a `DataParallel` engine, each batch of which runs whole on one lane; or a function of
            one batch, called on a lane; or an async function, awaited on the loop. A batch that is a
            tuple holds positional arguments, a dict keyword arguments.
        max_batch_size: most samples of a batch.
        max_wait: seconds a sample may wait for its batch to fill although a lane is free.
        max_queue: most calls in the queue; awaited calls beyond that wait, `call_nowait` refuses.
        timeout: seconds a call may take in all, unless it names its own; None for ever.
        size_of: length of a sample (tokens, pixels). Samples of like length are batched together.
        max_cost: most samples times longest of a batch, by `size_of`; a longer sample goes alone.
        max_padding: most of a batch that may be padding, by `size_of`, from 0 to 1. Full batches of
            unlike samples are slower than smaller batches of like ones.
        max_age: seconds after which a waiting call goes before every priority.
        pad: value that the default `collate` fills shorter tensors with.
        pad_to: the shapes that batches are padded to, for code that is compiled or captured by shape: the
            number of samples, then lengths of their first dimensions, `[(8, 64), (32, 128)]` say. A batch
            takes the smallest that holds it, with its last sample repeated, and stays as it is if none does.
        collate: makes a batch of samples, on a lane; the default stacks tensors, arrays and numbers.
        split: makes results of an output and its samples, on a lane; the default gives row i of every
            tensor to sample i, as a view.
        max_in_flight: batches that run at the same time; if None one per lane, but two on each CUDA lane of
            an engine.
        retry: `"halve"` finds the bad samples of a batch that raises by halving it, unless everything fails;
            `"none"` fails all its calls.
        hang_timeout: seconds after which a running task makes its lane suspect: other lanes are used until
            it has ended, and closing no longer waits for it; the runtime's own if None.
        runtime: the lanes a function runs on; the process's own if None. An engine brings its own.
        name: what traces and exported metrics call this batcher.

    Raises:
        ValueError: a number is none or out of range, or `max_cost` comes without `size_of`.
        TypeError: `size_of`, `collate` or `split` cannot be called.
        NotServableError: `engine` cannot be called.
    """

    def __init__(
        self,
        engine: Callable[..., Any],
        *,
        max_batch_size: int = 32,
        max_wait: float = 0.0,
        max_queue: int = 1024,
        timeout: float | None = None,
        size_of: Callable[[Any], float] | None = None,
        max_cost: float | None = None,
        max_padding: float = 0.1,
        max_age: float = 1.0,
        pad: float | None = None,
        pad_to: Sequence[int | Sequence[int]] | None = None,
        collate: Collate | None = None,
        split: Split = unbind,
        max_in_flight: int | None = None,
        retry: Literal["halve", "none"] = "halve",
        hang_timeout: float | None = None,
        runtime: Runtime | None = None,
        name: str | None = None,
    ) -> None:
        check_counts(max_batch_size=max_batch_size, max_queue=max_queue)
        if max_in_flight is not None:
            check_counts(most=_MOST_IN_FLIGHT, max_in_flight=max_in_flight)
        check_functions(split=split)
        check_functions(optional=True, size_of=size_of, collate=collate)
        max_wait, max_age = as_seconds("max_wait", max_wait), as_seconds("max_age", max_age)
        hang_timeout = as_optional_seconds("hang_timeout", hang_timeout, positive=True)
        check_runtime(runtime)
        _check_lengths(size_of, max_cost, max_padding, pad)
        if retry not in ("halve", "none"):
            raise ValueError(f'retry must be "halve" or "none", but got {shown(retry)}.')
        shapes = checked_shapes(pad_to, can_pad=pad is not None and collate is None)
        padding = Padding() if collate is None and pad is not None and size_of is None else None
        check_name(name)
        steps = Steps(collate or Stack(pad, padding, shapes), split, shapes)
        slots = open_slots(engine, steps, runtime, max_in_flight)
        queue: BatchQueue[Request] = BatchQueue(
            max_batch_size, max_queue, max_wait, max_age, max_cost, max_padding, sized=size_of is not None
        )
        recorder = Recorder(max_batch_size, name, padding)
        self._dispatcher = Dispatcher(
            slots, queue, recorder, halves=retry == "halve", hang_timeout=hang_timeout
        )
        self._capture = capture_of(engine)
        self._size_of = size_of
        self._timeout = as_optional_seconds("timeout", timeout)

    def __repr__(self) -> str:
        stats = self.statistics()
        return (
            f"<Batcher {self._dispatcher.state.value}: {stats.num_queued} queued, "
            f"{stats.num_running} running, {stats.num_done} done>"
        )

    async def __aenter__(self) -> Batcher:
        self._dispatcher.start()
        return self

    async def __aexit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        if exc is not None:
            self._dispatcher.reject_waiting(
                lambda: BatcherClosedError("the batcher was left by an exception")
            )
        await self.aclose(grace_of(exc))

    async def aclose(self, timeout: float | None = None) -> None:
        """Take no more calls, answer those that wait, and end; several tasks may do this at the same time.

        A cancellation of one of them fails the calls that wait; all return as soon as the lanes have drained,
        or 2 seconds later. Leaving the `async with` block by a cancellation waits no longer either.

        Args:
            timeout: seconds after which batches that still run fail with `LaneHungError` and are abandoned,
                which a warning says, and calls that wait fail with `BatcherClosedError`; None for ever.
        """
        await self._dispatcher.aclose(as_optional_seconds("timeout", timeout))

    async def __call__(self, sample: Any, *, timeout: float | None = None, priority: int = 0) -> Any:
        """Run one sample as part of some batch; wait for room if the queue is full.

        Args:
            sample: what `collate` makes batches of.
            timeout: seconds this call may take in all; the batcher's own if None.
            priority: higher goes first.

        Returns:
            The sample's own result.

        Raises:
            CallTimeoutError: the call was not answered in time.
            DeviceLostError: the device under its batch was lost.
            BatcherClosedError: outside of the batcher's `async with` block.
            NestedCallError: within what the batcher itself runs, which would wait for itself.
            EngineCancelledError: the engine raised a cancellation of its own, or what ends a process.
            ValueError: `timeout`, `priority` or what `size_of` gave is no number that it can be.
            BaseException: what the engine raised for this very sample.
        """
        return await self._submit(sample, timeout, priority)

    def call_nowait(self, sample: Any, *, timeout: float | None = None, priority: int = 0) -> Call:
        """Queue a sample if there is room; return its call, to await or to `cancel`.

        The arguments are those of an awaited call; `timeout` runs from now on.

        Raises:
            QueueFullError: the queue is full.
            BatcherClosedError, DeviceLostError, ValueError: as an awaited call.
        """
        queue = self._dispatcher.queue
        if queue.is_full:
            error = QueueFullError("this batcher", queue.max_queue)
            self._dispatcher.recorder.on_refused(error)
            raise error
        return Call(self._submit(sample, timeout, priority))

    def call_many_nowait(
        self, samples: Sequence[Any], *, timeout: float | None = None, priority: int = 0
    ) -> list[Call]:
        """Queue all samples of one request, or none of them; return their calls.

        A request is weighed by its samples: one of several is taken only if the queue has room for twice as
        many, or is empty. So large requests, however many come, leave room for small ones.

        The other arguments are those of an awaited call, for each sample.

        Raises:
            QueueFullError: the queue has no such room now.
            ValueError: there are more samples than the queue ever holds, or as an awaited call.
            TypeError: `samples` is one sample.
            BatcherClosedError, DeviceLostError: as an awaited call.
        """
        if isinstance(samples, (str, bytes, Mapping)) or not hasattr(samples, "__len__"):
            raise TypeError(
                f"samples must be a list of samples, but got a {type(samples).__name__}. Put it in a list."
            )
        count = len(samples)
        try:
            self._check_room(count)
            checked = [self._checked(sample, timeout, priority) for sample in samples]
            return [Call(self._dispatcher.submit(*each)) for each in checked]
        except Exception as error:
            self._dispatcher.recorder.on_refused(error, count)
            raise

    def check_room(self, num_samples: int = 1) -> None:
        """Refuse a request that `call_many_nowait` would refuse now, before work is done to prepare it.

        It counts as refused in statistics and metrics, too.

        Args:
            num_samples: of the request.

        Raises:
            QueueFullError: the queue has no room for them now.
            ValueError: `num_samples` is no number of samples, or more than the queue ever holds.
        """
        check_counts(num_samples=num_samples)
        try:
            self._check_room(num_samples)
        except Exception as error:
            self._dispatcher.recorder.on_refused(error, num_samples)
            raise

    def statistics(self) -> BatcherStatistics:
        """Return a snapshot of queue, batches and durations."""
        dispatcher = self._dispatcher
        return dispatcher.recorder.statistics(**dispatcher.counts())

    def _check_room(self, count: int) -> None:
        queue = self._dispatcher.queue
        if count > queue.max_queue:
            raise ValueError(
                f"{shown(count)} samples never fit in a queue of {queue.max_queue}. "
                "Make several requests of them, or raise max_queue."
            )
        if not queue.has_room(count):
            raise QueueFullError("this batcher", queue.max_queue, count)

    def _submit(self, sample: Any, timeout: float | None, priority: int) -> Request:
        """Queue a sample; if anything about it is wrong, nothing has changed."""
        try:
            return self._dispatcher.submit(*self._checked(sample, timeout, priority))
        except Exception as error:
            self._dispatcher.recorder.on_refused(error)
            raise

    def _checked(
        self, sample: Any, timeout: float | None, priority: int
    ) -> tuple[Any, float, int, float | None]:
        """Return the arguments by which the dispatcher queues a sample."""
        timeout = self._timeout if timeout is None else as_seconds("timeout", timeout)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ValueError(f"priority must be an int, but got {shown(priority)}. Higher goes first.")
        size = 0.0 if self._size_of is None else _checked_size(self._size_of(sample))
        if self._capture is not None:
            sample = StatedSample(self._capture(records=False), sample)
        return sample, size, priority, timeout


def _check_lengths(size_of: object, max_cost: Any, max_padding: Any, pad: Any) -> None:
    if pad is not None and not _can_fill(pad):
        raise ValueError(f"pad must be a number or None, but got {shown(pad)}.")
    if not (is_number(max_padding) and 0 <= max_padding <= 1):
        raise ValueError(f"max_padding is a share from 0 to 1, but got {shown(max_padding)}.")
    if max_cost is not None and not (is_number(max_cost) and max_cost > 0):
        raise ValueError(f"max_cost must be more than 0, but got {shown(max_cost)}. None sets no limit.")
    if max_cost is not None and size_of is None:
        raise ValueError("max_cost needs to know how long samples are. Pass size_of= too.")


def _can_fill(pad: Any) -> bool:
    if not isinstance(pad, numbers.Real):
        return False
    try:
        float(pad)
    except OverflowError:
        return False
    return True


def _checked_size(size: Any) -> float:
    try:
        length = float(size)
    except (TypeError, ValueError, OverflowError):
        length = math.nan
    if not 0 <= length < math.inf:
        raise ValueError(f"size_of gave {shown(size)} as the length of a sample. Return a number from 0 up.")
    return length
