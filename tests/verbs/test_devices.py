"""What a specification of devices means."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import nn

import asyncdp

from .models import Fn, numbered

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("spec", ["", ",", "cpu*", "cpu*-1", "cpu*x", "*2", "gpu", True, -1, ["cpu", None]])
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_default_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no CUDA device and nothing said, the lanes are CPU lanes, and a pass runs on them."""
    monkeypatch.delenv("ASYNCDP_DEVICES", raising=False)
    devices = asyncdp.parse_devices()
    assert set(devices) == {CPU}
    assert 1 <= len(devices) <= torch.get_num_threads()
    module = nn.Linear(1, 1)
    torch.testing.assert_close(asyncio.run(asyncdp.data_parallel(module, numbered(5))), module(numbered(5)))
