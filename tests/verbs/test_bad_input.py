"""A user's mistake is told with cause and remedy, before any lane does any work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import asyncdp
from asyncdp import errors

from .models import Fn, numbered

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")

X = numbered(4)
PACKED = pack_sequence([torch.zeros(3), torch.zeros(2)])


def scripted() -> nn.Module:
    """Return a TorchScript module."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(1, 1))


async def functional(module: Any, inputs: Any, devices: Any, **kwargs: Any) -> Any:
    return await asyncdp.data_parallel(module, inputs, devices, **kwargs)


async def engine(module: Any, inputs: Any, devices: Any, **kwargs: Any) -> Any:
    async with asyncdp.DataParallel(module, devices, **kwargs) as made:
        return await made(*inputs if type(inputs) is tuple else (inputs,))


async def verb(module: Any, _inputs: Any, devices: Any, **_kwargs: Any) -> Any:
    return asyncdp.replicate(module, devices)


async def functional_on_one(module: Any, inputs: Any, _devices: Any) -> Any:
    return await functional(module, inputs, "cpu")


async def engine_on_one(module: Any, inputs: Any, _devices: Any) -> Any:
    return await engine(module, inputs, "cpu")


Form = Callable[..., Coroutine[Any, Any, Any]]
LAZY = nn.LazyLinear(3)
DEVICES = [functional, engine, verb]
MODULES = [functional, engine, verb, functional_on_one, engine_on_one]
INPUTS = [functional, engine]


class Mistake:
    """What is wrong, in which forms, what is raised and which words it must say."""

    def __init__(
        self, forms: list[Form], module: Any, inputs: Any, devices: Any, error: type[Exception], *words: str
    ) -> None:
        self.forms, self.module, self.inputs, self.devices = forms, module, inputs, devices
        self.error, self.words = error, words


IDENTITY = nn.Identity()
MISTAKES = {
    "unknown device": Mistake(DEVICES, IDENTITY, X, "cpux", errors.UnknownDeviceError, "'cpux'", "cpu*4"),
    "unknown type": Mistake(DEVICES, IDENTITY, X, [1.5], errors.UnknownDeviceError, "1.5"),
    "no sequence": Mistake(DEVICES, IDENTITY, X, 1.5, errors.UnknownDeviceError, "1.5", "a float names no"),
    "no lanes": Mistake(DEVICES, IDENTITY, X, [], errors.NoDevicesError, "empty", "devices=None"),
    "no times": Mistake(DEVICES, IDENTITY, X, "cpu*0", errors.UnknownDeviceError, "positive"),
    "no module": Mistake(
        MODULES, len, X, "cpu*2", errors.NotAModuleError, "builtin_function_or_method", "Module"
    ),
    "a class": Mistake(MODULES, nn.Linear, X, "cpu*2", errors.NotAModuleError, "Module"),
    "lazy": Mistake(MODULES, LAZY, X, "cpu*2", errors.LazyModuleError, "'weight'", "one batch"),
    "lazy part": Mistake(
        MODULES, nn.Sequential(nn.LazyBatchNorm1d()), X, "cpu*2", errors.LazyModuleError, "'0.", "one batch"
    ),
    "TorchScript": Mistake(
        MODULES, scripted, X, "cpu*2", errors.UnsupportedModuleError, "TorchScript", "torch.export"
    ),
    "TorchScript part": Mistake(
        MODULES, lambda: nn.Sequential(scripted()), X, "cpu*2", errors.UnsupportedModuleError, "TorchScript"
    ),
    "compiled": Mistake(
        MODULES,
        lambda: torch.compile(nn.Linear(1, 1), backend="eager"),
        X,
        "cpu*2",
        errors.CompiledModuleError,
        "torch.compile",
        "plain module",
    ),
    "compiled part": Mistake(
        MODULES,
        lambda: nn.Sequential(torch.compile(nn.Linear(1, 1), backend="eager")),
        X,
        "cpu*2",
        errors.CompiledModuleError,
        "torch.compile",
    ),
    "lengths": Mistake(
        INPUTS, IDENTITY, (X, numbered(3)), "cpu*2", errors.LengthMismatchError, "has 4", "has 3", "dim 0"
    ),
    "packed": Mistake(
        INPUTS, IDENTITY, PACKED, "cpu*2", errors.UnsplittableError, "PackedSequence", "inside forward"
    ),
}
CASES = [
    pytest.param(form, mistake, id=f"{name}, {form.__name__}")
    for name, mistake in MISTAKES.items()
    for form in mistake.forms
]


@pytest.mark.parametrize(("form", "mistake"), CASES)
def test_mistake(form: Form, mistake: Mistake) -> None:
    """Every mistake raises its error, built-in type included, and says what to do instead."""
    module = mistake.module
    if not isinstance(module, (nn.Module, type)) and module is not len:
        module = module()
    with pytest.raises(mistake.error) as caught:
        asyncio.run(form(module, mistake.inputs, mistake.devices))
    assert isinstance(caught.value, (ValueError, TypeError, RuntimeError))
    for word in mistake.words:
        assert word in str(caught.value)


@no_cuda
@pytest.mark.parametrize("devices", ["cuda", "cuda:0", 0, ["cpu", "cuda:0"], torch.device("cuda", 0)])
@pytest.mark.parametrize("form", DEVICES)
def test_no_cuda(form: Form, devices: Any) -> None:
    """Asked for CUDA where there is none, the error begins as LibTorch's does."""
    with pytest.raises(RuntimeError) as caught:
        asyncio.run(form(IDENTITY, X, devices))
    assert str(caught.value).startswith("Expected at least one CUDA device to be available")


@pytest.mark.parametrize("form", INPUTS)
def test_bad_output_device(form: Form) -> None:
    """An output device that does not exist is told before any forward runs."""
    ran: list[int] = []
    module = Fn(lambda m, x: ran.append(1) or x)
    with pytest.raises(errors.UnknownDeviceError):
        asyncio.run(form(module, X, "cpu*2", output_device="nowhere"))
    assert not ran


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("dim", ["0", 0.0, None, True])
def test_bad_dim(form: Form, dim: Any) -> None:
    """A dimension that is no whole number is told before any forward runs."""
    ran: list[int] = []
    module = Fn(lambda m, x: ran.append(1) or x)
    with pytest.raises(TypeError, match=f"dim must be a whole number, but got {dim!r}"):
        asyncio.run(form(module, X, "cpu*2", dim=dim))
    assert not ran


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"inputs": [X]}, "Must have as many inputs as modules"),
        ({"devices": "cpu*3"}, "Must have as many devices as modules"),
        ({"kwargs": [{}]}, "Must have as many kwargs as modules"),
    ],
)
def test_counts_of_parallel_apply(given: dict[str, Any], words: str) -> None:
    """Contract 10: lists of unlike length are a ValueError with the sentence of LibTorch."""
    arguments: dict[str, Any] = {"inputs": [X, X], **given}
    with pytest.raises(ValueError, match="^" + words):
        asyncio.run(asyncdp.parallel_apply([IDENTITY, IDENTITY], **arguments))


def test_modules_of_parallel_apply() -> None:
    """Each of the modules must be one."""
    with pytest.raises(errors.NotAModuleError):
        asyncio.run(asyncdp.parallel_apply([IDENTITY, len], [X, X]))  # type: ignore[list-item]


@pytest.mark.parametrize("num_lanes", [0, 3, True, "some", 1.0])
def test_number_of_lanes(num_lanes: Any) -> None:
    """An engine cannot be split over lanes it has not."""
    with pytest.raises(ValueError, match="num_lanes must be"):
        asyncio.run(engine(IDENTITY, X, "cpu*2", num_lanes=num_lanes))


def test_lazy_module_after_one_batch() -> None:
    """Contract 19: the remedy of the error works."""
    module = nn.LazyLinear(3)
    module(X)
    assert asyncio.run(functional(module, X, "cpu*2")).shape == (4, 3)
