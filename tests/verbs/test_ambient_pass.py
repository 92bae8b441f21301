"""A forward in a lane runs under what the caller of the pass had switched on."""

from __future__ import annotations

import contextvars
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..notes import Notes
from .conftest import Passes
from .models import Fn, numbered

REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("REQUEST", default="none")


def look(m: Any, x: Tensor) -> Tensor:
    """Note the state of the lane."""
    m.seen.append(
        {
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "dtype": torch.get_autocast_dtype("cpu"),
            "cache": torch.is_autocast_cache_enabled(),
            "default dtype": torch.empty(()).dtype,
            "default device": torch.empty(()).device.type,
            "request": REQUEST.get(),
        }
    )
    return x


class DefaultDtype:
    """Another default dtype, for a while."""

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)


class Request:
    """A value in a context variable, for a while."""

    def __enter__(self) -> None:
        self._token = REQUEST.set("mine")

    def __exit__(self, *_: object) -> None:
        REQUEST.reset(self._token)


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (torch.no_grad(), {"grad": False}),
        (torch.inference_mode(), {"grad": False, "inference": True}),
        (torch.autocast("cpu", torch.bfloat16), {"autocast": True, "dtype": torch.bfloat16}),
        (
            torch.autocast("cpu", torch.float16, cache_enabled=False),
            {"autocast": True, "dtype": torch.float16, "cache": False},
        ),
        (DefaultDtype(), {"default dtype": torch.float64}),
        (Request(), {"request": "mine"}),
        (torch.device("meta"), {"default device": "meta"}),
    ],
    ids=["no_grad", "inference_mode", "bfloat16", "float16 uncached", "default dtype", "context", "device"],
)
def test_state_of_the_caller(
    dp: Passes, context: AbstractContextManager[Any], expected: dict[str, Any]
) -> None:
    """Contract 11, 17: the state goes to every lane with the pass, and stays in none."""
    module, x = Fn(look, seen=Notes()), numbered(4)
    dp(module, x)
    plain = module.seen.pop()
    with context:
        dp(module, x)
    dp(module, x)
    assert module.seen == [plain, {**plain, **expected}, {**plain, **expected}, plain, plain]


def test_autocast_reaches_the_arithmetic(dp: Passes) -> None:
    """A linear layer under autocast gives half precision, with gradients in the parameters' dtype."""
    module = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = dp(module, x), module(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    found.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32


def test_results_of_inference_mode(dp: Passes) -> None:
    """Contract 17: outputs made under inference mode are inference tensors; later passes learn again."""
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(4, 3)
    with torch.inference_mode():
        assert dp(module, x).is_inference()
    with torch.no_grad():
        assert not dp(module, x).requires_grad
    module.train()
    dp(module, x).sum().backward()
    assert module[0].weight.grad is not None
