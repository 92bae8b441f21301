"""Read files as `asyncdp infer` does and by another library, and count what is right, refused and wrong.

    scripts/check_files FOLDER...

A file is right if its records are those that the other library reads, refused if an error or a bad record
says why not, unknown if that took too long, and wrong in all other cases. Every file has a process of
its own, so that a crash counts too.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import multiprocessing
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from machine import origin, save

from asyncdp.errors import AsyncDPError
from asyncdp.infer.readers import FORMATS, Selection, decode_image, known_format, open_inputs

VERDICTS = ("right", "refused", "wrong", "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="for one file")
    parser.add_argument("--save", action="store_true", help="the table under docs/results")
    chosen = parser.parse_args()
    table: dict[str, Counter[str]] = defaultdict(Counter)
    others = []  # than right
    for folder in chosen.folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = known_format(path)
            if name is None:
                continue
            verdict, why = in_a_process(path, name, chosen.seconds)
            table[name][verdict] += 1
            if verdict != "right":
                why = why.replace(str(path), path.name)
                file = str(folder.name / path.relative_to(folder))
                others.append({"format": name, "file": file, "verdict": verdict, "why": why})
                print(f"{verdict:8} {path}: {why}", flush=True)
    names = [folder.name for folder in chosen.folders]
    result = {**origin(), "folders": names, "formats": dict(sorted(table.items())), "others": others}
    page = report(result)
    if chosen.save:
        save("check_files", result, page)
    else:
        print("\n" + page)
    sys.exit(1 if any(counts["wrong"] for counts in table.values()) else 0)


def report(result: dict[str, Any]) -> str:
    """Return the table as Markdown, and what was not right."""
    lines = [
        "# Other people's files, read as `asyncdp infer` reads them",
        "",
        f"`scripts/check_files {' '.join(result['folders'])}`, {result['date']}, commit {result['commit']},",
        f"Python {result['python']}. Right: the records are those that another library reads (pyarrow,",
        "pandas, Pillow, the standard library's json); refused: an error or a bad record says why not.",
        "",
        "| format | right | refused | wrong | unknown |",
        "|---|---|---|---|---|",
    ]
    for name, counts in result["formats"].items():
        numbers = " | ".join(str(counts.get(verdict, 0)) for verdict in VERDICTS)
        lines.append(f"| {name} | {numbers} |")
    lines += ["", "| file | | why |", "|---|---|---|"]
    for other in result["others"]:
        why = " ".join(other["why"].split()).replace("|", "\\|")
        lines.append(f"| {other['file']} | {other['verdict']} | {why[:160]} |")
    return "\n".join([*lines, ""])


def in_a_process(path: Path, name: str, seconds: float) -> tuple[str, str]:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=judge, args=(path, name, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return "unknown", f"no answer after {seconds:g} s"
        with contextlib.suppress(EOFError):
            verdict: tuple[str, str] = ours.recv()
            return verdict
        process.join()
        return "wrong", f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def judge(path: Path, name: str, answer: Any) -> None:
    try:
        answer.send(compare(path, name))
    except Exception as error:
        answer.send(("wrong", f"{type(error).__name__}: {error}"[:300]))


def compare(path: Path, name: str) -> tuple[str, str]:
    try:
        records = list(open_inputs([str(path)], name, Selection()).read())
    except AsyncDPError as error:
        return "refused", str(error)[:300]
    bad = next((record.error for record in records if record.error is not None), None)
    if bad is not None:
        return "refused", f"a record: {bad}"[:300]
    values = [record.value for record in records]
    if name == "images":
        try:
            values = [np.asarray(decode_image(path))]
        except Exception as error:
            return "refused", f"{type(error).__name__}: {error}"[:300]
    other = OTHERS.get(name)
    if other is None:
        return "refused", "no other library here reads it"
    expected = list(other(path))
    if len(values) != len(expected):
        return "wrong", f"{len(values)} records, not {len(expected)}"
    for index, pair in enumerate(zip(values, expected, strict=True)):
        if not same(*pair):
            return "wrong", f"record {index} is {pair[0]!r:.120}, not {pair[1]!r:.120}"
    return "right", ""


def same(ours: Any, theirs: Any) -> bool:
    """Return whether two values are the same; times may be Python's and NumPy's."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, np.ndarray) or isinstance(theirs, np.ndarray):
        a, b = np.asarray(ours), np.asarray(theirs)
        if a.dtype == b.dtype == np.uint8 and a.ndim == 3:
            # Pixels: libraries round transparency in their own ways.
            return a.shape == b.shape and bool((abs(a.astype(int) - b.astype(int)) <= 1).all())
        return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, np.datetime64 | np.timedelta64):
        unit = np.datetime_data(ours.dtype)[0]
        return theirs == ours.astype(np.int64) or bool(ours == type(ours)(theirs, unit))
    if isinstance(ours, float) and isinstance(theirs, float) and ours != ours:
        return theirs != theirs
    return type(ours) is type(theirs) and bool(ours == theirs)


def of_arrow(table: Any) -> Iterator[dict[str, Any]]:
    """Yield rows; times that Python cannot hold as the numbers that Arrow stores."""
    columns = {name: [plain(value) for value in table[name]] for name in table.column_names}
    for index in range(table.num_rows):
        yield {name: values[index] for name, values in columns.items()}


def plain(scalar: Any) -> Any:
    if not scalar.is_valid:
        return None
    if getattr(scalar.type, "unit", None) == "ns":
        return scalar.value
    if pyarrow.types.is_struct(scalar.type):
        return {key: plain(scalar[key]) for key in scalar}
    if pyarrow.types.is_list(scalar.type):
        return [plain(value) for value in scalar.values]
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return scalar.value


def parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    return of_arrow(pyarrow.parquet.read_table(path, partitioning=None, memory_map=False))


def arrow(path: Path) -> Iterator[Any]:
    is_file = path.read_bytes()[:6] == b"ARROW1"
    with (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(str(path)) as reader:
        return of_arrow(reader.read_all())


def csv(path: Path, delimiter: str = ",") -> list[Any]:
    import pandas

    frame = pandas.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False, na_filter=False)
    return [dict(row) for row in frame.astype(object).to_dict("records")]


def jsonl(path: Path) -> list[Any]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]


def image(path: Path) -> list[Any]:
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):  # the library's own conversion cuts values off at 255
            grey = np.asarray(upright).astype(int)
            clear = grey == upright.info.get("transparency")
            return [np.where(clear, 255, np.rint(grey / 257)).astype(np.uint8)[..., None].repeat(3, axis=2)]
        if not upright.has_transparency_data:
            return [np.asarray(upright.convert("RGB"))]
        pixels = np.asarray(upright.convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return [np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)]


OTHERS: dict[str, Callable[[Path], Any]] = {
    "parquet": parquet,
    "arrow": arrow,
    "csv": csv,
    "tsv": lambda path: csv(path, "\t"),
    "jsonl": jsonl,
    "npy": lambda path: list(np.load(path)),
    "images": image,
}

if __name__ == "__main__":
    assert OTHERS.keys() <= FORMATS.keys()
    main()
