"""Fake devices for tests of code that uses asyncdp.

Their tensors live on the CPU; the test decides when tasks complete, how time passes and what goes wrong.
The pytest plugin of asyncdp has fixtures for them.
"""

from __future__ import annotations

from .clock import VirtualClock
from .fake import FakeDevice, FakeDeviceLost, fake_devices
from .faults import Fault, FaultKind

__all__ = ["FakeDevice", "FakeDeviceLost", "Fault", "FaultKind", "VirtualClock", "fake_devices"]
