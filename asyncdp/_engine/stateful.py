"""The state of an engine's module: snapshots, checkpoints, and changes from outside."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from .._runtime import Runtime, scheduler_of
from .._training.checkpoint.content import Content
from .._training.checkpoint.keeper import Checkpoint, CheckpointKeeper
from .._training.state import copy_state
from ..errors import NotAnOptimizerError
from .calls import Calls, EngineView
from .route import Route


class StatefulCalls(Calls):
    """Calls of an engine that knows the state of its module.

    Args:
        runtime: see `Calls`.
        route: see there.
        num_lanes: see there.
        is_adaptive: see there.
    """

    _checkpoints: CheckpointKeeper

    def __init__(self, runtime: Runtime, route: Route, num_lanes: int, is_adaptive: bool) -> None:
        super().__init__(runtime, route, num_lanes, is_adaptive)
        self.runtime = runtime
        self.module = route.module
        self._views: dict[bool, EngineView] = {}

    async def snapshot(self, optimizer: Any = None) -> dict[str, Any]:
        """Return a copy of the module's state, and of the optimizer's, as of a whole step.

        Copied on a lane, where no step of any engine over the module changes it meanwhile. Forward and
        backward of a step may go on, and only its end waits for the copy.

        Args:
            optimizer: of torch.optim; its state is that of the same moment.

        Returns:
            `{"module": module.state_dict()}`, and `"optimizer": optimizer.state_dict()` if one was given,
            on the devices where they are.

        Raises:
            NotAnOptimizerError: the optimizer has no state to copy.
        """
        if optimizer is not None and not callable(getattr(optimizer, "state_dict", None)):
            raise NotAnOptimizerError(optimizer)
        lane = scheduler_of(self.runtime).least_busy(self.lanes)[0]
        return await self.runtime.run(copy_state, self.module, self._route.parts(), optimizer, lane=lane)

    async def save(
        self,
        path: str | os.PathLike[str],
        optimizer: Any = None,
        scheduler: Any = None,
        *,
        scaler: Any = None,
        extra: Any = None,
    ) -> Checkpoint:
        """Save a checkpoint by torch.distributed.checkpoint: all that a training needs to go on elsewhere.

        Copied to the CPU on a lane between two steps, and written by a thread while further steps run. The
        folder is whole or not there, and an earlier checkpoint stays until the new one is whole. With a
        `process_group` all processes call this, between the same steps, and the first of them writes.

        Args:
            path: its folder.
            optimizer: of torch.optim; its state is saved too.
            scheduler: of torch.optim.lr_scheduler; likewise.
            scaler: a `torch.amp.GradScaler`; likewise.
            extra: something small of yours that can be pickled: the epoch, the state of a sampler.

        Raises:
            NotAnOptimizerError, NotASchedulerError, TypeError, ValueError: an argument is none of the above.
            CheckpointError: something else is at the path, or it cannot be written.
            PeerStepError: another process has failed, or processes are out of step.
        """
        make_content = partial(Content, self.module, optimizer, scheduler, scaler)
        return await self._checkpoints.save(path, make_content, extra)

    async def load(
        self,
        path: str | os.PathLike[str],
        optimizer: Any = None,
        scheduler: Any = None,
        *,
        scaler: Any = None,
        restore_generators: bool = True,
    ) -> Checkpoint:
        """Load a checkpoint into the module, and into what else is given; between two steps, all or nothing.

        Gradients, also accumulated ones, are discarded. Load only what you trust: pickle reads parts of it.
        With a `process_group` all processes call this, and all read the folder.

        Args:
            path: the folder that `save` wrote, in this process or in another one.
            optimizer: as saved; it keeps `foreach`, `fused` and `capturable` as it was made.
            scheduler: as saved.
            scaler: as saved.
            restore_generators: set the random generators of torch, Python and NumPy to what they were too.

        Returns:
            What was loaded: `num_steps` is also that of the engine now, `extra` what was given to `save`.

        Raises:
            NotAnOptimizerError, NotASchedulerError, TypeError, ValueError: an argument is none of the above.
            NotACheckpointError, DamagedCheckpointError: nothing whole is there.
            CheckpointMismatchError: names, shapes, dtypes or classes differ.
            PeerStepError: another process has failed, or processes are out of step.
        """
        make_content = partial(Content, self.module, optimizer, scheduler, scaler)
        loaded = await self._checkpoints.load(path, make_content, restores_generators=restore_generators)
        self.refresh()
        return loaded

    def refresh(self) -> None:
        """Notice changes made behind autograd's back (`parameter.data.add_(...)`) at the next call.

        Needed only for lanes on another device than the module's.
        """
        for route in self._routes():
            route.replicas.refresh()

    def _routes(self) -> list[Route]:
        return [self._route, *(view._route for view in self._views.values())]
