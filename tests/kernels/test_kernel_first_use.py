"""Which threads compile at first use: lanes, and threads without an event loop; never a loop's own."""

from __future__ import annotations

import _thread
import threading

import anyio
import anyio.to_thread
import pytest
import torch
from test_kernel_chain import CUDA, Foreign, pretend_cuda

from asyncdp import Runtime
from asyncdp import _kernels as kernels
from asyncdp._kernels import chain, cuda, first_use, launch, reference
from asyncdp.errors import KernelsUnavailableError

CALLS = {
    "reduce_add": lambda: kernels.reduce_add([torch.ones(1)], CUDA),
    "reduce_add_many": lambda: kernels.reduce_add_many([[torch.ones(1)]], CUDA)[0],
    "gather": lambda: kernels.gather([Foreign(CUDA)], 0, CUDA),
}


class Loader:
    """A substitute for building and loading that ends when the test lets it and records the threads."""

    def __init__(self):
        self.may_end = threading.Event()
        self.threads = []

    def load_all(self, device):
        self.threads.append(threading.current_thread())
        assert device == CUDA
        assert self.may_end.wait(30)

    def end(self):
        self.may_end.set()
        for thread in started():
            thread.join(30)


def started():
    """Return the threads that load in the background; they end only after the loader may end."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("asyncdp-kernels")]


@pytest.fixture
def loader(monkeypatch):
    """Pretend a CUDA device with a complete chain, nothing loaded; calls return which kernels ran."""
    monkeypatch.delenv("ASYNCDP_KERNELS", raising=False)
    chain._report.cache_clear()
    pretend_cuda(monkeypatch)
    monkeypatch.setattr(first_use, "_loaded", set())
    monkeypatch.setattr(first_use, "_loading", set())
    loader = Loader()
    monkeypatch.setattr(launch, "load_all", loader.load_all)
    for module, name in ((cuda, "compiled"), (reference, "reference")):
        monkeypatch.setattr(module, "reduce_add_many", lambda *_, name=name: [name])
    monkeypatch.setattr(reference, "reduce_add", lambda *_: "reference")
    monkeypatch.setattr(cuda, "has_copy_kernel", lambda *_: True)
    monkeypatch.setattr(cuda, "gather", lambda *_: "compiled")
    monkeypatch.setattr(torch, "cat", lambda *_: "reference")
    yield loader
    loader.end()
    chain._report.cache_clear()


def on_foreign_thread(call):
    """Call on a thread that Python did not start, as autograd does for CUDA."""
    found = []
    ended = threading.Event()

    def run():
        found.append(call())
        ended.set()

    _thread.start_new_thread(run, ())
    assert ended.wait(30)
    return found[0]


@pytest.mark.anyio
@pytest.mark.parametrize("name", CALLS)
async def test_a_loop_thread_takes_the_reference_until_all_is_loaded(loader, name):
    """A call on a loop's thread neither builds nor waits; one other thread builds, and then it is used."""
    assert [CALLS[name]() for _ in range(3)] == ["reference"] * 3
    await anyio.to_thread.run_sync(loader.end)
    assert len(loader.threads) == 1
    assert loader.threads[0] is not threading.current_thread()
    assert CALLS[name]() == "compiled"


@pytest.mark.anyio
async def test_a_warning_that_became_an_error_puts_loading_off(loader, monkeypatch):
    """Loading that fails by another thread's filters for warnings begins anew with the next call."""

    def warn(device):
        raise DeprecationWarning("of an import")

    monkeypatch.setattr(launch, "load_all", warn)
    assert CALLS["gather"]() == "reference"
    await anyio.to_thread.run_sync(loader.end)
    monkeypatch.setattr(launch, "load_all", loader.load_all)
    assert CALLS["gather"]() == "reference"
    await anyio.to_thread.run_sync(loader.end)
    assert CALLS["gather"]() == "compiled"


@pytest.mark.anyio
async def test_a_loop_thread_does_not_look_at_the_machine(loader, monkeypatch):
    """Looking up what is installed reads files, so the loading thread does it."""
    looked = []
    monkeypatch.setattr(chain, "missing_distributions", lambda: looked.append(threading.get_ident()) or ())
    assert CALLS["gather"]() == "reference"
    await anyio.to_thread.run_sync(loader.end)
    assert CALLS["gather"]() == "compiled"
    assert len(looked) == 1
    assert looked[0] != threading.get_ident()


@pytest.mark.anyio
async def test_lanes_build_what_they_call_and_warm_up_serves_everyone(loader):
    """A lane builds what it calls itself; once a lane has warmed up, the loop's thread runs kernels too."""
    async with Runtime("cpu") as runtime:
        assert await runtime.run(CALLS["reduce_add"]) == "compiled"
        assert loader.threads == []
        loader.may_end.set()
        await runtime.run(kernels.warm_up, CUDA)
    assert CALLS["reduce_add"]() == "compiled"
    assert len(loader.threads) == 1


def test_a_thread_without_a_loop_compiles_what_it_calls(loader):
    """A script without an event loop gets the compiled kernels from its first call on."""
    assert [call() for call in CALLS.values()] == ["compiled"] * 3
    assert loader.threads == []


def test_threads_of_autograd_take_the_reference_until_all_is_loaded(loader):
    """A loop may be waiting for a thread that is not one of Python's."""
    assert on_foreign_thread(CALLS["reduce_add"]) == "reference"
    loader.end()
    assert on_foreign_thread(CALLS["reduce_add"]) == "compiled"


def test_forced_kernels_are_used_wherever_no_loop_runs(loader, monkeypatch):
    """ASYNCDP_KERNELS=numba makes autograd's threads wait too: a script gets only what it asked for."""
    monkeypatch.setenv("ASYNCDP_KERNELS", "numba")
    assert CALLS["gather"]() == "compiled"
    assert on_foreign_thread(CALLS["gather"]) == "compiled"


@pytest.mark.anyio
async def test_forcing_holds_up_no_loop(loader, monkeypatch):
    """A forced choice is loaded beside the loop like any other; the plain kernels need no loading."""
    monkeypatch.setenv("ASYNCDP_KERNELS", "torch")
    assert CALLS["gather"]() == "reference"
    assert started() == []
    monkeypatch.setenv("ASYNCDP_KERNELS", "numba")
    assert CALLS["gather"]() == "reference"
    await anyio.to_thread.run_sync(loader.end)
    assert CALLS["gather"]() == "compiled"


@pytest.mark.anyio
async def test_forcing_what_is_incomplete_raises_on_a_loop_too(loader, monkeypatch):
    """With a part missing, ASYNCDP_KERNELS=numba is an error on a loop's thread, not the reference."""
    pretend_cuda(monkeypatch, driver=(12, 8))
    monkeypatch.setenv("ASYNCDP_KERNELS", "numba")
    with pytest.raises(KernelsUnavailableError, match=r"CUDA 12\.8"):
        CALLS["gather"]()
    assert started() == []


def test_incomplete_chains_load_nothing(loader, monkeypatch):
    """Where only plain torch can run, warming up does nothing."""
    pretend_cuda(monkeypatch, driver=(12, 8))
    kernels.warm_up(CUDA)
    assert CALLS["gather"]() == "reference"
    assert loader.threads == []
