"""The pytest plugin, used as by the suite of another project."""

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
    result.assert_outcomes(passed=6 if has_gpu else 5, skipped=0 if has_gpu else 1)


def test_markers_skip_with_a_reason(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests for devices that are not there are skipped, and the reason names what is missing."""
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


def test_missing_devices_are_the_reason(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a CUDA device both markers skip, and each reason has the number of devices needed."""
    monkeypatch.setattr("asyncdp.pytest_plugin._num_cuda_devices", lambda: 0)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_one(): pass

        @pytest.mark.multi_device
        def test_two(): pass
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rs", "-p", "no:asyncio")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines_random(["*needs 1 CUDA devices, torch sees 0*", "*needs 2 CUDA devices*"])


def test_fixtures_give_time_and_every_fault(pytester: pytest.Pytester) -> None:
    """Delays pass by `asyncdp_clock`; faults may be given by name; tasks held at the end are completed."""
    pytester.makepyfile(
        """
        import threading
        import anyio
        import pytest
        from asyncdp.testing import Fault

        RUNTIMES = []
        BEFORE = threading.enumerate()  # other tests of this process may have lanes too

        @pytest.fixture(params=["asyncio", "trio"])
        def anyio_backend(request):
            return request.param

        @pytest.mark.anyio
        @pytest.mark.asyncdp_faults(faults={(1, 0): Fault.delay(2.0)})
        async def test_delay(asyncdp_clock, asyncdp_devices, asyncdp_runtime):
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: asyncdp_runtime.run(int, lane=asyncdp_runtime.lanes[1]))
                await asyncdp_devices[1].wait_issued()
                assert asyncdp_runtime.statistics().num_running == 1
                asyncdp_clock.advance(2.0)
            assert asyncdp_runtime.statistics().num_done == 1

        def start(runtime):
            RUNTIMES.append(runtime)
            call = runtime.run(int, lane=runtime.lanes[0])
            call.send(None)  # its loop has ended before the device is done
            return call

        @pytest.mark.anyio
        @pytest.mark.asyncdp_faults({(0, 0): Fault.delay(2.0)})
        async def test_left_in_the_middle_of_a_delay(asyncdp_devices, asyncdp_runtime):
            RUNTIMES.append(start(asyncdp_runtime))
            await asyncdp_devices[0].wait_issued()

        @pytest.mark.anyio
        @pytest.mark.asyncdp_faults({(0, 0): Fault.hang()})
        async def test_left_in_the_middle_of_a_hang(asyncdp_devices, asyncdp_runtime):
            RUNTIMES.append(start(asyncdp_runtime))
            await asyncdp_devices[0].wait_issued()

        def test_all_lanes_have_ended():
            assert len(RUNTIMES) == 8
            left = [each for each in threading.enumerate() if each not in BEFORE]
            assert not [each for each in left if each.name.startswith("asyncdp-")]
            for call in RUNTIMES[1::2]:
                call.close()
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:asyncio")
    result.assert_outcomes(passed=7)


def test_a_marker_without_faults_is_an_error(pytester: pytest.Pytester) -> None:
    """The marker without faults, or with too much, is an error that names it."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.asyncdp_faults
        def test_none(asyncdp_devices): pass

        @pytest.mark.asyncdp_faults({}, {})
        def test_two(asyncdp_devices): pass
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:asyncio")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*asyncdp_faults() missing 1 required positional argument: 'faults'*"])


def test_plugin_does_not_import_torch() -> None:
    """A pytest run that does not use the plugin does not wait for torch."""
    code = "import sys, asyncdp.pytest_plugin; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_every_exported_name_exists() -> None:
    """Every name in `asyncdp.__all__` can be imported, and any other is an AttributeError."""
    import asyncdp

    assert all(hasattr(asyncdp, name) for name in asyncdp.__all__)
    assert set(asyncdp.__all__) <= set(dir(asyncdp))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = asyncdp.nonsense
