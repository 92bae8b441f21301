"""Errors go from process to process as they are."""

from __future__ import annotations

import inspect
import pickle

import pytest

from asyncdp import errors

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.AsyncDPError) and cls.__module__.startswith("asyncdp.")
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_errors_can_be_sent_to_another_process(cls: type[errors.AsyncDPError]) -> None:
    """An error that went through pickle has its class, its words, its attributes and its notes."""
    error = cls.__new__(cls)
    error.args = ("what happened. What to do.",)
    error.position = 3
    error.add_note("in replica 1 on lane cuda:1")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error) == "what happened. What to do."
    assert vars(copy) == vars(error)
