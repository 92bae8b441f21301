"""The pytest plugin, used as a suite of its own would use it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "testing.md"


def example() -> str:
    found = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_documented_suite_passes(pytester: pytest.Pytester) -> None:
    """The example of docs/testing.md passes in a fresh session, on pytest-asyncio, anyio and trio."""
    pytester.makepyfile(example())
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(params=["asyncio", "trio"])
        def anyio_backend(request):
            return request.param
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rs", "--strict-markers")
    import torch

    has_gpu = torch.cuda.is_available()
    result.assert_outcomes(passed=4 if has_gpu else 3, skipped=0 if has_gpu else 1)


def test_markers_skip_with_a_reason(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests for devices that are not there are skipped, and say what they miss."""
    monkeypatch.setattr("asyncdp.pytest_plugin._num_cuda_devices", lambda: 1)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_one(): pass

        @pytest.mark.multi_device
        def test_two(): pass

        @pytest.mark.parametrize("asyncdp_devices", [3], indirect=True)
        def test_three(asyncdp_devices): assert len(asyncdp_devices) == 3
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rs", "-p", "no:asyncio")
    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines(["*needs 2 CUDA devices, torch sees 1*"])


def test_plugin_does_not_import_torch() -> None:
    """A pytest run that does not use the plugin does not wait for torch."""
    code = "import sys, asyncdp.pytest_plugin; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_every_exported_name_exists() -> None:
    """What `asyncdp` says it exports can be imported, and nothing else is invented."""
    import asyncdp

    assert all(hasattr(asyncdp, name) for name in asyncdp.__all__)
    assert set(asyncdp.__all__) <= set(dir(asyncdp))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = asyncdp.nonsense
