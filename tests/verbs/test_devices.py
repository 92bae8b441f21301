"""What a specification of devices means."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import asyncdp

from .models import Fn, numbered

CPU = torch.device("cpu")

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.mark.parametrize(
    ("spec", "devices"),
    [
        ("cpu", [CPU]),
        ("cpu*4", [CPU] * 4),
        (" cpu * 2 , cpu", [CPU] * 3),
        (["cpu", CPU, "cpu:0"], [CPU] * 3),
        (CPU, [CPU]),
        (("cpu*2",), [CPU] * 2),
    ],
)
def test_specifications(spec: Any, devices: list[torch.device]) -> None:
    """Names, repeats, sequences and torch devices give one device per lane."""
    assert asyncdp.parse_devices(spec) == devices


@pytest.mark.parametrize(
    "spec",
    ["", ",", "cpu*", "cpu*-1", "cpu*x", "*2", "gpu", True, -1, ["cpu", None], 1.5, 1j, len, object()],
)
def test_malformed_specifications(spec: Any) -> None:
    """What names no device is a ValueError that says how to name one."""
    with pytest.raises(ValueError, match=r"[Nn]ame"):
        asyncdp.parse_devices(spec)


def test_environment_sets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ASYNCDP_DEVICES` says what `devices=None` means; a pass takes as many lanes."""
    monkeypatch.setenv("ASYNCDP_DEVICES", "cpu*3")
    assert asyncdp.parse_devices() == [CPU] * 3
    shards: list[int] = []
    module = Fn(lambda m, x: shards.append(len(x)) or x)
    asyncio.run(asyncdp.data_parallel(module, numbered(6)))
    assert shards == [2, 2, 2]


@pytest.mark.parametrize("named", ["warp*3", "cpu*0", "cpu,"])
def test_a_bad_environment_is_named(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """An error about the default tells where the default comes from."""
    monkeypatch.setenv("ASYNCDP_DEVICES", named)
    with pytest.raises(ValueError, match=f"ASYNCDP_DEVICES={re.escape(repr(named))}"):
        asyncdp.parse_devices()


@no_cuda
def test_cuda_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The well-known sentence comes first, then where CUDA was asked for."""
    monkeypatch.setenv("ASYNCDP_DEVICES", "cuda")
    with pytest.raises(RuntimeError, match=r"^Expected at least one CUDA device .* ASYNCDP_DEVICES='cuda'"):
        asyncdp.parse_devices()


USE_NAMED_DEVICES = """
import asyncio, torch, asyncdp

async def main():
    module, x = torch.nn.Linear(1, 1), torch.ones(4, 1)
    assert (await asyncdp.data_parallel(module, x, "cpu*2")).shape == (4, 1)
    await asyncdp.parallel_apply([module], [x], devices="cpu")
    async with asyncdp.DataParallel(module, "cpu*2") as engine:
        await engine(x)
    try:
        await asyncdp.data_parallel(module, x)
    except ValueError as error:
        print(error)

asyncio.run(main())
"""


def test_a_bad_environment_matters_to_the_default_only() -> None:
    """Whoever names devices never hears of it."""
    done = subprocess.run(
        [sys.executable, "-c", USE_NAMED_DEVICES],
        env={**os.environ, "ASYNCDP_DEVICES": "warp"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ASYNCDP_DEVICES='warp'" in done.stdout


@no_cuda
def test_default_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no CUDA device and nothing said, the lanes are CPU lanes, and a pass runs on them."""
    monkeypatch.delenv("ASYNCDP_DEVICES", raising=False)
    devices = asyncdp.parse_devices()
    assert set(devices) == {CPU}
    assert 1 <= len(devices) <= torch.get_num_threads()
    module = nn.Linear(1, 1)
    torch.testing.assert_close(asyncio.run(asyncdp.data_parallel(module, numbered(5))), module(numbered(5)))
