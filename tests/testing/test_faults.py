"""Faults of fake devices: those that cannot happen are rejected, others happen at their lane and task."""

from __future__ import annotations

import anyio
import pytest

from asyncdp import LaneState, Runtime
from asyncdp.errors import DeviceLostError
from asyncdp.testing import FakeDevice, Fault, VirtualClock, fake_devices

pytestmark = pytest.mark.anyio


class Bang(Exception):
    pass


def test_time_needs_a_clock_on_every_lane() -> None:
    """A delay without a clock is rejected on the first lane of a device and on every other."""
    with pytest.raises(ValueError, match="needs a clock"):
        FakeDevice(faults={0: Fault.delay(1.0)})
    with pytest.raises(ValueError, match="needs a clock"):
        FakeDevice().sibling(faults={0: Fault.delay(1.0)})
    with pytest.raises(ValueError, match="needs a clock"):
        fake_devices(1, lanes_per_device=2, faults={(1, 0): Fault.delay(1.0)})
    device = FakeDevice(clock=VirtualClock())
    assert device.sibling(faults={0: Fault.delay(1.0)}).device == device.device


@pytest.mark.parametrize("place", [(4, 0), (-1, 0), (0, -1)])
def test_faults_need_a_lane_and_a_task(place: tuple[int, int]) -> None:
    """A fault at a lane or task that cannot exist is rejected; the message has the number of lanes."""
    with pytest.raises(ValueError, match="lanes 0 to 3"):
        fake_devices(2, lanes_per_device=2, faults={place: Fault.hang()})


@pytest.mark.parametrize("lane", [0, 1, 2, 3])
@pytest.mark.parametrize("call", [0, 2])
async def test_every_fault_happens_at_its_lane_and_task(lane: int, call: int) -> None:
    """Task number `call` of lane `lane` raises, is delayed, hangs or loses its device; no other task does."""
    clock = VirtualClock()
    kinds = {
        "raise": Fault.raising(Bang()),
        "delay": Fault.delay(2.0),
        "hang": Fault.hang(),
        "lose": Fault.lose(),
    }
    for kind, fault in kinds.items():
        devices = fake_devices(2, lanes_per_device=2, clock=clock, faults={(lane, call): fault})
        outcomes: list[object] = []

        async def run(runtime: Runtime, place: int, outcomes: list[object] = outcomes) -> None:
            try:
                outcomes.append(await runtime.run(int, lane=runtime.lanes[place]))
            except (Bang, DeviceLostError, RuntimeError) as error:
                outcomes.append(error)

        async with Runtime(devices) as runtime:
            for other in {*range(4)} - {lane}:
                for _ in range(4):
                    assert await runtime.run(int, lane=runtime.lanes[other]) == 0
            for _ in range(call):
                assert await runtime.run(int, lane=runtime.lanes[lane]) == 0
            async with anyio.create_task_group() as group:
                group.start_soon(run, runtime, lane)
                await devices[lane].wait_issued(call + 1)
                await anyio.wait_all_tasks_blocked()
                if kind == "delay":
                    assert not outcomes
                    clock.advance(2.0)
                elif kind == "hang":
                    clock.advance(100.0)
                    await anyio.wait_all_tasks_blocked()
                    assert not outcomes
                    devices[lane].release()
            if kind == "raise":
                assert isinstance(outcomes[0], Bang)
            elif kind == "lose":
                assert "lost" in str(outcomes[0])
                states = [each.state for each in runtime.statistics().lanes]
                assert [state is LaneState.LOST for state in states] == [
                    n // 2 == lane // 2 for n in range(4)
                ]
                continue
            else:
                assert outcomes == [0]
            assert await runtime.run(int, lane=runtime.lanes[lane]) == 0
