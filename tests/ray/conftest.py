"""One small cluster for all tests of a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncdp

ROOT = Path(asyncdp.__file__).parents[1]
MODELS = ROOT / "tests" / "infer"  # that of models_for_tests

sys.path.insert(0, str(MODELS))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Start a cluster of one node, four processors by Ray's count, which finds the models of the tests."""
    ray = pytest.importorskip("ray")
    folders = [ROOT, MODELS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()
