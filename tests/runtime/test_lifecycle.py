"""The default runtime over loops, threads, forks and the interpreter's end; devices by name."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import asyncdp
from asyncdp.errors import NoCudaDeviceError, NoDevicesError, UnknownDeviceError

from .helpers import PATIENCE, lane_threads

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA devices")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, warnings being errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_one_runtime_serves_loops_one_after_another() -> None:
    """The default runtime survives the loop that first used it."""
    threads = {asyncio.run(asyncdp.default_runtime().run(threading.get_ident)) for _ in range(3)}
    assert len(threads) == 1


def test_one_runtime_serves_loops_side_by_side() -> None:
    """Loops in several threads share the default runtime, and each gets its own results."""
    results: dict[int, list[int]] = {}
    start = threading.Barrier(4)

    def serve(number: int) -> None:
        async def main() -> None:
            runtime = asyncdp.default_runtime()
            results[number] = [await runtime.run(lambda value=value: value + number) for value in range(50)]

        start.wait(PATIENCE)
        asyncio.run(main())

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == {number: list(range(number, number + 50)) for number in range(4)}


def test_a_loop_closed_under_a_call_breaks_nothing() -> None:
    """A pass whose loop is gone when it ends leaves the lane working."""
    entered, opened = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert opened.wait(PATIENCE)

    loop = asyncio.new_event_loop()
    task = loop.create_task(asyncdp.default_runtime().run(hold))
    while not entered.is_set():
        loop.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    opened.set()
    del task
    assert asyncio.run(asyncdp.default_runtime().run(int)) == 0


def test_the_interpreter_ends_cleanly() -> None:
    """A program that never closes anything ends at once, without a word."""
    done = run_python(
        """
        import asyncio, asyncdp, torch
        print(asyncio.run(asyncdp.data_parallel(torch.nn.Identity(), torch.arange(3), "cpu*2")))
        forgotten = asyncdp.Runtime("cpu*2")
        asyncio.run(forgotten.run(int))
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "tensor([0, 1, 2])\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_builds_its_own() -> None:
    """In a forked child the default runtime is new, and an older explicit one says why it is closed."""
    done = run_python(
        """
        import asyncio, os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: what this is about
        import torch, asyncdp
        asyncio.run(asyncdp.default_runtime().run(int))
        old = asyncdp.Runtime("cpu")
        torch.ones(1 << 20).add_(1)  # brings this thread helpers, whom the child must not wait for
        child = os.fork()
        if child == 0:
            assert asyncio.run(asyncdp.default_runtime().run(int, "7")) == 7
            try:
                asyncio.run(old.run(int))
            except asyncdp.errors.RuntimeClosedError as error:
                assert "before a fork" in str(error)
                sys.exit(42)
            sys.exit(1)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), asyncio.run(old.run(int, "8")))
        """
    )
    assert (done.returncode, done.stdout.strip()) == (0, "42 8"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_fork_while_a_step_is_taken_and_recorded(tmp_path: Path) -> None:
    """A child forked in the midst of a training step is refused further ones, and records nothing."""
    done = run_python(
        f"""
        import asyncio, os, signal, threading, warnings
        import torch, asyncdp
        from torch.nn.functional import mse_loss

        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: what this is about
        module, x = torch.nn.Linear(2, 2), torch.ones(4, 2)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        engine = asyncdp.DataParallel(module, "cpu")
        reached, leave = threading.Event(), threading.Event()

        def loss(output, target):
            reached.set()
            leave.wait()
            return mse_loss(output, target)

        async def step(loss_fn=mse_loss):
            await engine.train_step(x, x, loss_fn, optimizer)

        def run_child():
            signal.alarm(20)
            assert asyncio.run(asyncdp.default_runtime().run(int, "7")) == 7
            try:
                asyncio.run(step())
            except asyncdp.errors.RuntimeClosedError as error:
                os._exit(42 if "before a fork" in str(error) else 1)
            os._exit(1)

        async def main():
            async with asyncdp.TraceRecorder({str(tmp_path / "trace.json")!r}) as recorder:
                under_way = asyncio.create_task(step(loss))
                await asyncio.to_thread(reached.wait)
                with recorder._lock:
                    child = os.fork()
                    if child == 0:
                        run_child()
                leave.set()
                await under_way
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        print(asyncio.run(main()), engine.statistics().num_steps)
        """
    )
    assert (done.returncode, done.stdout.strip()) == (0, "42 1"), done.stderr


def test_a_dropped_runtime_ends_its_threads() -> None:
    """A runtime nobody refers to any more stops its lanes."""
    before = lane_threads()
    runtime = asyncdp.Runtime("cpu*2")
    threads = [thread for thread in lane_threads() if thread not in before]
    del runtime
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_fork_while_locks_are_held() -> None:
    """Locks that other threads hold at a fork, whatever for, hold up nothing in the child."""
    done = run_python(
        """
        import asyncio, os, signal, threading, warnings
        import torch, asyncdp
        from asyncdp import _tree
        from asyncdp._devices import threads
        from asyncdp._replicas.replica_set import replica_set_of
        from asyncdp._runtime import default, scheduler_of

        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: what this is about
        module, x = torch.nn.Linear(2, 2), torch.ones(4, 2)
        one_pass = lambda: asyncio.run(asyncdp.data_parallel(module, x, "cpu*2"))
        expected = one_pass()

        class Batch(list):
            pass

        # For long: whatever an admitted pass or a preparation on a lane may hold. It ends with the process.
        scheduler = scheduler_of(asyncdp.default_runtime())
        replicas = replica_set_of(module, [torch.device("cpu")] * 2)
        engine = asyncdp.DataParallel(module, "cpu*2")
        long = [replicas._lock, scheduler.lock, default._default_lock, engine._route.replicas._lock]
        # For a moment: a fork may wait for these.
        short = [_tree._registering, threads._changing]
        taken, forking, ended = threading.Barrier(2), threading.Event(), threading.Event()

        def hold():
            for lock in (*long, *short):
                lock.acquire()
            taken.wait()
            forking.wait()
            for lock in short:
                lock.release()
            ended.wait()
            for lock in long:
                lock.release()

        # The last one registered is the first one called.
        os.register_at_fork(before=forking.set)
        threading.Thread(target=hold).start()
        taken.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            assert asyncdp.scatter(Batch([x]), "cpu*2")[1][0].shape == (2, 2)
            assert torch.equal(one_pass(), expected)
            try:
                asyncio.run(engine(x))
            except asyncdp.errors.RuntimeClosedError:
                os._exit(42)
            os._exit(1)
        ended.set()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        assert torch.equal(one_pass(), expected)
        assert torch.equal(asyncio.run(engine(x)), expected)
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("spec", "count"),
    [("cpu", 1), ("cpu*3", 3), ("cpu,cpu", 2), (["cpu", torch.device("cpu")], 2), ("cpu * 2", 2)],
)
def test_device_specifications(spec: object, count: int) -> None:
    """Every documented way to name CPU lanes gives that many."""
    assert asyncdp.parse_devices(spec) == [torch.device("cpu")] * count  # type: ignore[arg-type]


def test_default_devices_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """ASYNCDP_DEVICES says what None means."""
    monkeypatch.setenv("ASYNCDP_DEVICES", "cpu*3")
    assert len(asyncdp.parse_devices()) == 3
    monkeypatch.setenv("ASYNCDP_DEVICES", "warp*3")
    with pytest.raises(UnknownDeviceError, match="torch knows no device"):
        asyncdp.parse_devices()


@no_cuda
def test_without_a_gpu_the_default_is_cpu_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane per core torch uses, at most eight."""
    monkeypatch.delenv("ASYNCDP_DEVICES", raising=False)
    assert len(asyncdp.parse_devices()) == min(torch.get_num_threads(), 8)


@no_cuda
@pytest.mark.parametrize("spec", ["cuda", "cuda:0", 0, [0, 1], torch.device("cuda:0")])
def test_cuda_asked_for_and_missing(spec: object) -> None:
    """Naming CUDA on a machine without it fails at once, with the well-known sentence."""
    with pytest.raises(NoCudaDeviceError, match=r"^Expected at least one CUDA device to be available"):
        asyncdp.parse_devices(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("gpu", "torch knows no device of this name"),
        ("cpu*0", "positive integer"),
        ("cpu*x", "positive integer"),
        ("", "torch knows no device of this name"),
        (-1, "not negative"),
        ([1.5], "a float names no device"),
        ([True], "a bool names no device"),
        ("xpu", "torch sees no xpu device"),
    ],
)
def test_unknown_devices_are_told_apart(spec: object, cause: str) -> None:
    """A malformed or missing device is a ValueError that says what is wrong and what would be right."""
    with pytest.raises(UnknownDeviceError, match=cause) as caught:
        asyncdp.parse_devices(spec)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert "Name devices as" in str(caught.value)


def test_no_devices_at_all() -> None:
    """An empty list is refused, not taken for the default."""
    with pytest.raises(NoDevicesError, match="the list of devices is empty"):
        asyncdp.parse_devices([])
