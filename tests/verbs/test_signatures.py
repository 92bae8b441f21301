"""What callers may write: the verbs' arguments keep their names, order, kinds and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import asyncdp

SIGNATURES: dict[Callable[..., Any], str] = {
    asyncdp.data_parallel: ("module, inputs, devices=None, output_device=None, dim=0, *, module_kwargs=None"),
    asyncdp.scatter: "inputs, devices, *, dim=0",
    asyncdp.replicate: "module, devices, *, detach=False",
    asyncdp.parallel_apply: "modules, inputs, *, kwargs=None, devices=None",
    asyncdp.gather: "outputs, output_device, *, dim=0",
    asyncdp.backward: ("tensors, grad_tensors=None, *, retain_graph=None, create_graph=False, inputs=None"),
}
AWAITED = {asyncdp.data_parallel, asyncdp.parallel_apply, asyncdp.backward}


@pytest.mark.parametrize("verb", SIGNATURES, ids=lambda verb: verb.__name__)
def test_signatures(verb: Callable[..., Any]) -> None:
    """What is written once goes on working: a verb's arguments are what they were, and so is its kind."""
    signature = inspect.signature(verb)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    found = inspect.Signature(bare)
    assert str(found) == f"({SIGNATURES[verb]})"
    assert inspect.iscoroutinefunction(verb) == (verb in AWAITED)
