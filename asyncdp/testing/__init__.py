"""Fake devices for tests of code that uses asyncdp.

Their tensors live on the CPU; when works complete, how time passes and what goes wrong is up to the
test. The pytest plugin of asyncdp offers them as fixtures too.
"""

from __future__ import annotations

from .fake import FakeDevice, FakeDeviceLost, Fault, FaultKind, VirtualClock, fake_devices

__all__ = ["FakeDevice", "FakeDeviceLost", "Fault", "FaultKind", "VirtualClock", "fake_devices"]
