"""The actor without Ray around it: what goes in and out, and which devices it takes."""

from __future__ import annotations

import functools
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
import torch

pytest.importorskip("ray.data")

import asyncdp
from asyncdp.errors import BatcherClosedError, JobUsageError, NoLaneWorksError, RecordError
from asyncdp.ray import InferenceActor
from asyncdp.ray.resources import lanes_of

pytestmark = pytest.mark.anyio


async def made(model: Any, **options: Any) -> InferenceActor:
    """Make an actor beside the loop, as Ray does: it loads its model."""
    return await anyio.to_thread.run_sync(functools.partial(InferenceActor, model, **options))


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray is not installed, `asyncdp.ray` says what to install, and the rest of asyncdp needs none."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    monkeypatch.delitem(sys.modules, "asyncdp.ray")
    with pytest.raises(ImportError, match=r"asyncdp\.ray needs the package ray.*asyncdp\[ray\]"):
        importlib.import_module("asyncdp.ray")
    assert "ray" not in asyncdp.__all__


def test_lanes_are_what_ray_gave() -> None:
    """A GPU is a lane by its place among the visible ones, else a CPU is, at least one and at most eight."""
    assert lanes_of(["2", "3"], 4, "2,3") == ["cuda:0", "cuda:1"]
    assert lanes_of(["3"], 0, None) == ["cuda:3"]
    assert lanes_of(["GPU-ab"], 1, "GPU-cd,GPU-ab") == ["cuda:1"]
    assert lanes_of([], 0, "") == ["cpu"]
    assert lanes_of([], 2.5, None) == ["cpu"] * 2
    assert lanes_of([], 64, None) == ["cpu"] * 8


async def test_arrays_become_what_the_model_expects() -> None:
    """NumPy's doubles are float32 to a model of float32; the result of a sample is its row alone."""
    actor = await made(lambda: torch.nn.Linear(3, 2), devices="cpu*2")
    batch = np.ones((64, 3))
    batch.setflags(write=False)
    result = await actor.run_batch(batch)
    assert result.dtype == torch.float32
    row = await actor.run_sample(np.ones(3))
    assert torch.allclose(row, result[0])
    assert len(pickle.dumps(row)) < 1000
    assert (await actor.statistics()).engine.num_lanes == 2
    await actor.aclose()


async def test_it_is_ill_once_no_lane_works() -> None:
    """Closed, it answers nobody and says so to whoever asks for its health."""
    actor = await made(torch.nn.ReLU, devices="cpu")
    assert await actor.check_health() == {"cpu:0": "open"}
    await actor.aclose()
    await actor.aclose()
    with pytest.raises(NoLaneWorksError, match="cpu:0 is closed"):
        await actor.check_health()
    with pytest.raises(BatcherClosedError):
        await actor.run_sample(torch.ones(1))


async def test_a_folder_takes_texts_and_gives_columns(encoder_folder: Path) -> None:
    """Over an encoder's folder a batch is a list of texts, a sample one text, and outputs have names."""
    actor = await made(str(encoder_folder), devices="cpu*2", task="embed")
    batch = await actor.run_batch(np.array(["one", "two three", "four"], dtype=object))
    samples: dict[str, np.ndarray] = {}

    async def ask(text: str) -> None:
        samples[text] = (await actor.run_sample(text))["embedding"]

    async with anyio.create_task_group() as group:
        for text in ("one", "two three", "four"):
            group.start_soon(ask, text)
    for text, vector in zip(("one", "two three", "four"), batch["embedding"], strict=True):
        np.testing.assert_allclose(samples[text], vector, atol=1e-6)
    with pytest.raises(RecordError, match="value 1 of the batch"):
        await actor.run_batch(["one", 2])
    for mistake in ("one", []):
        with pytest.raises(JobUsageError):
            await actor.run_batch(mistake)
    await actor.aclose()
