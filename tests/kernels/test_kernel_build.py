"""Machine code of every kernel, built, read and launched without a GPU."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from stub_driver import compiler, run_under_stub

from asyncdp._kernels.chain import missing_distributions

if missing_distributions():
    pytest.skip(f"needs the cuda extra: {missing_distributions()}", allow_module_level=True)

from asyncdp._kernels import bodies, build, source

ARCHITECTURES = [(8, 0), (9, 0), (10, 0)]
LAUNCH = """
launch.launch("reduce_add_int32", 0, 70_000, (1 << 40) + 8, 161, 4)
launch.launch("reduce_add_int32", 0, 1, 16, 1, 2)
print(len(launch._kernels), len(launch._streams))
"""
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Yield the folder of an empty cache, so that the code checked is what the source gives now."""
    directory = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASYNCDP_CACHE_DIR", str(directory))
        yield directory


def disassembler(name):
    """Return the path of one of the wheels' disassemblers."""
    for place in sys.path:
        path = Path(place, "nvidia", "cu13", "bin", name)
        if path.exists():
            return str(path)
    pytest.skip(f"{name} is not installed: pip install nvidia-cuda-{name}")


def instructions(file):
    """Return a cubin's instructions by address."""
    command = [disassembler("cuobjdump"), "-sass", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {int(address, 16): code.strip() for address, code in INSTRUCTION.findall(text)}


def target(text):
    """Return where an instruction branches to, or None."""
    branch = re.search(r"\b(?:BRA|CALL)\S*\s.*?(0x[0-9a-f]+)", text)
    return branch and int(branch[1], 16)


def inner_loops(code):
    """Return the instructions of every innermost loop, from the target of a backward branch up to it."""
    backward = [(to, at) for at, text in code.items() if (to := target(text)) is not None and to < at]
    innermost = [
        (to, at)
        for to, at in backward
        if not any(to <= start and end < at for start, end in backward if (start, end) != (to, at))
    ]
    return [[text for at, text in code.items() if to <= at <= end] for to, end in innermost]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
@pytest.mark.parametrize("kernel", build.KERNELS)
def test_kernel_code_is_what_it_should_be(cache, kernel, architecture):
    """Each kernel builds for each architecture, with wide loads in its main loop, no spills and no calls."""
    file = cache / "code.cubin"
    file.write_bytes(build.cubin(kernel, architecture))
    code = instructions(file)
    text = list(code.values())
    assert not [line for line in text if re.search(r"\b(LDL|STL)", line)]
    # The assembler ends some loops by a "call" of the exit; of anything else it would be a real one.
    calls = [line for line in text if re.search(r"\bCALL", line)]
    assert all(code[target(line)] == "EXIT" for line in calls)
    main_loops = [
        loop for loop in inner_loops(code) if sum("LDG.E.128" in line for line in loop) >= bodies.UNROLL
    ]
    assert not [line for loop in main_loops for line in loop if line in calls]
    assert main_loops
    assert sum("STG.E.128" in line for line in text) >= bodies.UNROLL


def test_resources_leave_two_blocks_to_a_multiprocessor(cache):
    """A kernel uses no stack and no local memory, and at most 128 registers a thread."""
    file = cache / "usage.cubin"
    file.write_bytes(build.cubin("reduce_add_float32", (9, 0)))
    command = [disassembler("cuobjdump"), "-res-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    assert "Function reduce_add_float32:" in usage
    assert int(numbers["REG"]) <= 128
    assert (numbers["STACK"], numbers["LOCAL"]) == ("0", "0")


@pytest.mark.skipif(compiler() is None, reason="needs a C compiler for the stub of the driver")
def test_a_launch_passes_its_table_on_the_current_stream(cache, tmp_path):
    """Grid, block, stream and every 64-bit argument reach the driver; kernel and stream are wrapped once."""
    lines = run_under_stub(LAUNCH, tmp_path, trace=True).splitlines()
    assert lines == [
        "launch grid 70000 block 256 stream 0x2000 arguments 1099511627784 161 4",
        "launch grid 1 block 256 stream 0x2000 arguments 16 1 2",
        "1 1",
    ]


def test_numpy_is_left_as_it_was():
    """Numba's CUDA target imports with a NumPy that has no `row_stack`, and the user's NumPy gets none."""
    code = """
import numpy
import numba.np.arrayobj  # goes by NumPy's version, not by what it has
if hasattr(numpy, "row_stack"):
    del numpy.row_stack
    numpy.__all__.remove("row_stack")
from asyncdp._kernels import source
source.ptx("copy", (9, 0))
print("row_stack" in vars(numpy))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"


def test_the_disassembler_reads_the_code(cache):
    """A disassembler newer than the toolkit reads its code, by the kernel's plain name."""
    file = cache / "read.cubin"
    file.write_bytes(build.cubin("copy", (9, 0)))
    listing = subprocess.run(
        [disassembler("nvdisasm"), str(file)], capture_output=True, text=True, check=True
    )
    assert ".text.copy" in listing.stdout


def test_halves_are_converted_by_the_hardware(cache):
    """float16 and bfloat16 are rounded to nearest even, two to an instruction, and added as float32."""
    for dtype, rounding in (("float16", "cvt.rn.f16x2.f32"), ("bfloat16", "cvt.rn.bf16x2.f32")):
        text = source.ptx(f"reduce_add_{dtype}", (9, 0))
        assert rounding in text
        assert "add.f32" in text
        assert not re.search(r"\b(add|fma)\.(rn\.)?(f16|bf16|ftz)", text)


def test_every_listed_kernel_has_a_source():
    """The names that can be built are the names there is source for."""
    assert set(build.SUMMED_DTYPES) == set(source._SUMS)


def test_a_second_call_reads_the_cache(cache, monkeypatch):
    """What has been built is read again, not built again."""
    built = build.cubin("copy", (8, 0))
    monkeypatch.setattr(build, "_build", None)
    assert build.cubin("copy", (8, 0)) == built


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"x" + data[41:]]
)
def test_a_damaged_file_is_built_again(tmp_path, monkeypatch, damage):
    """A cut or altered file in the cache is never loaded."""
    monkeypatch.setenv("ASYNCDP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_build", lambda kernel, capability: bytes(range(100)))
    code = build.cubin("copy", (9, 0))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert build.cubin("copy", (9, 0)) == code == bytes(range(100))
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_writable_cache_code_is_still_built(tmp_path, monkeypatch):
    """A cache that cannot be written costs time, never a failure."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASYNCDP_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(build, "_build", lambda kernel, capability: b"code")
    assert build.cubin("copy", (9, 0)) == b"code"


def _race(directory, barrier, results):
    import os

    os.environ["ASYNCDP_CACHE_DIR"] = directory
    from asyncdp._kernels import build

    barrier.wait()
    results.put(build.cubin("reduce_add_int32", (9, 0)))


def test_eight_processes_build_at_once(tmp_path):
    """Eight processes that start together on an empty cache all get whole code, and leave one file."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    arguments = (str(tmp_path), barrier, results)
    processes = [context.Process(target=_race, args=arguments) for _ in range(8)]
    with warnings.catch_warnings():
        # The children touch none of the threads that a fork leaves behind.
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    codes = [results.get(timeout=50) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(set(map(len, codes))) == 1
    (file,) = tmp_path.iterdir()
    assert build._read(file) in codes
