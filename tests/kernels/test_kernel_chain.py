"""Which kernels a device runs, and what a report says of it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from asyncdp import Runtime
from asyncdp import _kernels as kernels
from asyncdp._devices import lane_device_for
from asyncdp._kernels import chain, first_use, transfer
from asyncdp.errors import KernelsUnavailableError
from tests.cuda_stub import cuda_stub

__all__ = ["cuda_stub"]

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Forget what was found out before, and take no setting from outside."""
    monkeypatch.delenv("ASYNCDP_KERNELS", raising=False)
    chain._report.cache_clear()
    yield
    chain._report.cache_clear()


def pretend_cuda(monkeypatch, capability=(9, 0), driver=(13, 0), missing=()):
    """Let the chain find a CUDA device of this kind."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(chain, "_driver_version", lambda: driver)
    monkeypatch.setattr(chain, "missing_distributions", lambda: missing)


def test_the_whole_chain_is_used():
    """The chain of this project's development environment is complete."""
    assert chain.missing_distributions() == ()


def test_cpu_runs_plain_torch(monkeypatch):
    """A CPU has no compiled kernels, whatever is forced, and lacks nothing."""
    monkeypatch.setenv("ASYNCDP_KERNELS", "numba")
    report = kernels.report("cpu")
    assert (report.implementation, report.missing, report.remedy) == ("torch", (), "")


def test_a_complete_chain_runs_numba(monkeypatch):
    """With every part in place the report names Numba's kernels."""
    pretend_cuda(monkeypatch)
    assert kernels.report(CUDA).implementation == "numba"
    monkeypatch.setenv("ASYNCDP_KERNELS", "torch")
    assert kernels.report(CUDA).implementation == "torch"


@pytest.mark.parametrize(
    ("machine", "missing", "remedy"),
    [
        ({"missing": ("numba-cuda 0.30.4 is not installed",)}, "numba-cuda", 'pip install "asyncdp[cuda]"'),
        ({"capability": (7, 5)}, "compute capability 7.5 is below 8.0", "newer device"),
        ({"capability": (13, 0)}, "compute capability 13.0 is newer", "newer release of asyncdp"),
        ({"driver": (12, 8)}, "CUDA 12.8", "driver to 580"),
    ],
)
def test_a_report_names_what_is_missing_and_how_to_get_it(monkeypatch, machine, missing, remedy):
    """Plain torch runs, and the report has the missing part and the command that installs it."""
    pretend_cuda(monkeypatch, **machine)
    report = kernels.report(CUDA)
    assert report.implementation == "torch"
    assert missing in report.missing[0]
    assert remedy in report.remedy


def test_forcing_numba_raises_where_it_cannot_run(monkeypatch):
    """With ASYNCDP_KERNELS=numba a missing part is an error, not a silent fall-back."""
    pretend_cuda(monkeypatch, driver=(12, 8))
    monkeypatch.setenv("ASYNCDP_KERNELS", "numba")
    with pytest.raises(
        KernelsUnavailableError, match=r"the driver supports CUDA 12.8.*update the NVIDIA driver"
    ):
        chain.implementation(CUDA)
    assert "every call will fail" in kernels.report(CUDA).reason


def test_a_wrong_setting_is_refused(monkeypatch):
    """A misspelt ASYNCDP_KERNELS is an error, not a silent choice."""
    monkeypatch.setenv("ASYNCDP_KERNELS", "nubma")
    with pytest.raises(ValueError, match="Set it to numba or torch"):
        kernels.report("cpu")


def test_absent_and_wrong_versions_are_told_apart(monkeypatch):
    """A package is named with the version it lacks, or the one it has and the one it needs."""
    versions = {name: f"{prefix or '1.'}0" for name, prefix in chain.DISTRIBUTIONS.items()}
    versions["nvidia-nvvm"] = "13.5.1"
    del versions["cuda-core"]

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    assert chain.missing_distributions() == (
        "cuda-core is not installed",
        "nvidia-nvvm is 13.5.1, but 13.0.* is needed",
    )


class Foreign:
    """A tensor of another device, as far as `bring` uses it."""

    def __init__(self, device, log=None):
        self.device = device
        self.log = [] if log is None else log

    def to(self, device, non_blocking):
        self.log.append(f"copied on {current[-1]}")
        return Foreign(device)

    def record_stream(self, stream):
        self.log.append(f"lent to {stream}")


current = ["the current stream"]


@contextlib.contextmanager
def make_current(stream):
    """Do what `torch.cuda.stream` does, as far as `Foreign` shows it."""
    current.append(stream)
    yield
    current.pop()


@pytest.fixture
def no_peers(monkeypatch):
    """Forget every lane, peer and count."""
    monkeypatch.setattr(transfer, "_counter", transfer._Counter())
    monkeypatch.setattr(transfer, "_lane_streams", {})
    monkeypatch.setattr(transfer, "_peers", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", make_current)


def test_tensors_of_other_devices_are_read_in_place_or_staged(no_peers, monkeypatch):
    """Peers that reach each other both ways are read in place and kept, others copied; both are counted."""
    near, far = torch.device("cuda", 1), torch.device("cuda", 2)
    monkeypatch.setattr(transfer, "_peers", {frozenset((0, 1)): True, frozenset((0, 2)): False})
    monkeypatch.setattr(transfer, "_lane_streams", {0: "lane 0's", 2: "lane 2's"})
    tensors = [Foreign(device) for device in (CUDA, near, far, torch.device("cpu"))]
    brought = transfer.bring(tensors, CUDA)
    assert [tensor.device for tensor in brought] == [CUDA, near, CUDA, CUDA]
    assert [tensor.log for tensor in tensors] == [
        [],
        ["lent to stream of cuda:0"],
        ["lent to lane 2's", "copied on lane 2's"],
        ["copied on the current stream"],
    ]
    assert kernels.path_statistics() == kernels.PathStatistics(num_peer=1, num_staged=2)


def test_a_device_without_lanes_is_staged_on_the_callers_stream(no_peers):
    """Peer access is never enabled in the middle of a call."""
    source = Foreign(torch.device("cuda", 1))
    transfer.bring([source], CUDA)
    assert source.log == ["copied on the current stream"]
    assert not transfer._peers


def test_a_kernel_waits_for_the_devices_of_its_inputs(monkeypatch):
    """The destination's stream is ordered once after each other CUDA device's, and after no CPU."""

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            waits.append((str(self.device), str(other.device)))

    waits = []
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    devices = (CUDA, torch.device("cuda", 1), torch.device("cuda", 1), torch.device("cpu"))
    assert transfer.wait_for_sources([Foreign(device) for device in devices], CUDA)
    assert not transfer.wait_for_sources([Foreign(CUDA)], CUDA)
    assert waits == [("cuda:0", "cuda:1")]


def test_peers_count_only_when_both_directions_work(no_peers, monkeypatch):
    """A device that can be read but cannot read back is staged, and so is the memory of the host."""
    copies = []
    monkeypatch.setattr(torch, "zeros", lambda size, device: Foreign(device, copies))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a.index < b.index or b.index == 1)
    devices = [torch.device("cuda", index) for index in range(3)]
    monkeypatch.setattr(Foreign, "to", lambda self, device: copies.append((self.device.index, device.index)))
    for device in devices:
        transfer.add_lane(device, f"stream of {device}")
    assert transfer._peers == {
        frozenset((0, 1)): False,
        frozenset((0, 2)): False,
        frozenset((1, 2)): True,
    }
    assert sorted(copies) == [(1, 2), (2, 1)]
    assert transfer._readable(devices[2], devices[1])
    assert not transfer._readable(devices[0], devices[1])
    assert not transfer._readable(torch.device("cpu"), devices[1])


def test_a_lost_peer_is_no_reason_to_lose_another_device(no_peers, monkeypatch):
    """An error while peer access is enabled leaves the pair staged, and the lane that opens goes on."""

    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(torch, "zeros", fail)
    transfer.add_lane(CUDA, "first")
    transfer.add_lane(torch.device("cuda", 1), "second")
    assert not transfer._readable(CUDA, torch.device("cuda", 1))


@pytest.mark.anyio
async def test_lanes_enable_peer_access_between_their_own_devices_at_the_start(cuda_stub, monkeypatch):
    """Each pair of devices that have lanes is asked once, on lanes' threads; no other device is touched."""
    asked = []

    def can_access(one, other):
        asked.append(((one.index, other.index), threading.current_thread().name))
        return one.index < other.index

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", can_access)
    for _ in range(2):
        async with Runtime([cuda_stub.lane(3), cuda_stub.lane(5), cuda_stub.lane(5)]):
            pass
    assert {index for pair, _ in asked for index in pair} == {3, 5}
    assert len(asked) <= 2  # both directions, or the first one that says no
    assert all(name.startswith("asyncdp-cpu:") for _, name in asked)
    assert transfer._peers == {frozenset((3, 5)): False}


def test_calls_go_to_the_kernels_of_the_destination(monkeypatch):
    """A CUDA destination with a complete chain runs the compiled kernels, any other one plain torch."""
    pretend_cuda(monkeypatch)
    from asyncdp._kernels import cuda, launch

    monkeypatch.setattr(cuda, "reduce_add_many", lambda groups, destination: [("sum", len(groups))])
    monkeypatch.setattr(cuda, "gather", lambda tensors, dim, destination: ("gather", dim))
    monkeypatch.setattr(first_use, "_loaded", set())
    loaded = []
    monkeypatch.setattr(launch, "load_all", loaded.append)
    tensors = [torch.ones(2)] * 2
    assert kernels.reduce_add(tensors, CUDA) == ("sum", 1)
    assert kernels.gather(tensors, 0, CUDA) == ("gather", 0)
    for device in (CUDA, torch.device("cpu")):
        lane_device_for(device).warm_up()
    assert loaded == [CUDA]
    assert kernels.reduce_add(tensors, torch.device("cpu")).tolist() == [2.0, 2.0]


def test_the_driver_is_asked_for_its_version(monkeypatch):
    """13.2 is read from the driver's 13020, whatever torch and the packages of the chain offer."""

    def get_version(address):
        address._obj.value = 13020
        return 0

    library = SimpleNamespace(cuDriverGetVersion=get_version)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert chain._driver_version() == (13, 2)
    library.cuDriverGetVersion = lambda address: 3
    with pytest.raises(RuntimeError, match="CUDA error 3"):
        chain._driver_version()
