"""What a launch hands to the CUDA driver, seen by a driver that does nothing."""

from __future__ import annotations

import pytest
from stub_driver import compiler, run_under_stub

from asyncdp._kernels.chain import missing_distributions

if missing_distributions():
    pytest.skip(f"needs the cuda extra: {missing_distributions()}", allow_module_level=True)
pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler for the stub of the driver")

LAUNCH = """
launch.launch("reduce_add_int32", 0, 70_000, (1 << 40) + 8, 161, 4)
launch.launch("reduce_add_int32", 0, 1, 16, 1, 2)
print(len(launch._kernels), len(launch._streams))
"""


def test_a_launch_passes_its_table_on_the_current_stream(tmp_path, monkeypatch):
    """Grid, block, stream and every 64-bit argument reach the driver; kernel and stream are wrapped once."""
    monkeypatch.setenv("ASYNCDP_CACHE_DIR", str(tmp_path / "cache"))
    lines = run_under_stub(LAUNCH, tmp_path, trace=True).splitlines()
    assert lines == [
        "launch grid 70000 block 256 stream 0x2000 arguments 1099511627784 161 4",
        "launch grid 1 block 256 stream 0x2000 arguments 16 1 2",
        "1 1",
    ]
