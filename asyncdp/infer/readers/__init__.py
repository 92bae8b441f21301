"""Input files of every format as one stream of numbered records."""

from __future__ import annotations

import glob
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import InputError
from ..places import (
    Found,
    find,
    find_all,
    find_matching,
    is_remote,
    names_in,
    open_place,
    outside,
    place_of,
    unreachable,
)
from ..records import Record, Records
from ..where import Sample, Subset
from . import arrays, arrow, audio, databases, images, parquet, tar, text
from .audio import decode_audio
from .base import COMPRESSIONS, STDIN, Contents, Dialect, InputFile, Reader
from .images import decode_image
from .selection import Selection
from .whole_files import WholeFileReader

__all__ = [
    "FORMATS",
    "STDIN",
    "Dialect",
    "InputFile",
    "Inputs",
    "Selection",
    "decode_audio",
    "decode_image",
    "known_format",
    "open_inputs",
]

FORMATS: dict[str, Reader] = {
    "jsonl": text.JsonlReader(),
    "csv": text.CsvReader(","),
    "tsv": text.CsvReader("\t"),
    "lines": text.LinesReader(),
    "parquet": parquet.ParquetReader(),
    "npy": arrays.NPY,
    "npz": arrays.NPZ,
    "safetensors": arrays.SAFETENSORS,
    "images": WholeFileReader("images", "PIL", "pillow", "cli"),
    "audio": WholeFileReader("audio", "soundfile", "soundfile", "audio"),
    "arrow": arrow.ArrowReader(),
    "webdataset": tar.TarReader(),
    "sqlite": databases.SqliteReader(),
    "duckdb": databases.DuckDBReader(),
}

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "lines",
    ".parquet": "parquet",
    ".npy": "npy",
    ".npz": "npz",
    ".safetensors": "safetensors",
    **dict.fromkeys((".arrow", ".feather", ".arrows"), "arrow"),
    ".tar": "webdataset",
    **dict.fromkeys((".sqlite", ".sqlite3", ".db"), "sqlite"),
    ".duckdb": "duckdb",
    **dict.fromkeys(images.SUFFIXES, "images"),
    **dict.fromkeys(audio.SUFFIXES, "audio"),
}


def open_inputs(
    specs: Sequence[str],
    format_name: str | None,
    selection: Selection,
    *,
    output: Path | None = None,
    dialect: Dialect | None = None,
    subset: Subset | None = None,
) -> Inputs:
    """Find the files that `specs` name.

    Args:
        specs: paths, folders, glob patterns, or `-` for standard input.
        format_name: one of `FORMATS`, or None to go by the suffixes.
        selection: which columns are wanted.
        dialect: how text files are written.
        subset: which records are wanted; None for all.
        output: a folder whose files are passed over: a resumed job must not read its own shards.

    Raises:
        InputError: a file is missing or a pipe, its format is unknown, or formats are mixed.
    """
    passed_over: Counter[str] = Counter()
    found = [file for spec in specs for file in _expand(spec, passed_over)]
    files = [InputFile(file, dialect) for file in (found if output is None else _outside(output, found))]
    names = {format_name or _format_of(file) for file in files}
    if len(names) != 1:
        raise InputError(
            f"The inputs are of several formats ({', '.join(sorted(names))})",
            "Run one job per format, or name the format with --input-format.",
        )
    return Inputs(files, names.pop(), selection, dict(sorted(passed_over.items())), subset)


class Inputs:
    """The records of all files, in order.

    Attributes:
        counts: rows of each file, None where it does not state them.
        sample: the positions that are wanted, None for all.
        file_rows: rows of the files that do not state it, by position, once they were read to their end; a
            resumed job knows them from its journal and opens none that lies before what it has to do.
    """

    def __init__(
        self,
        files: list[InputFile],
        format_name: str,
        selection: Selection,
        passed_over: Mapping[str, int] | None = None,
        subset: Subset | None = None,
    ) -> None:
        self.passed_over = passed_over or {}
        self.files = files
        self.format_name = format_name
        self.selection = selection
        self.num_records_read = 0
        self.file_rows: dict[int, int] = {}
        self.unfit: dict[str, tuple[str, str]] = {}
        self._reader = FORMATS[format_name]
        self.subset = subset or Subset()
        self.counts = [self._inspect(file) for file in files]
        self.sample = self._make_sample()

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records one by one; the arguments are those of `read_together`."""
        return itertools.chain.from_iterable(self.read_together(start, stop))

    def read_together(
        self, start: int = 0, stop: int | None = None, num_before: int = 0
    ) -> Iterator[Records]:
        """Yield the records from position `start` to `stop`, as many at a time as are there.

        What files state that are outside is not read. The spans follow each other and leave out no position.

        Args:
            start: position of the first record.
            stop: position behind the last one, None for all.
            num_before: how many records before `start` the job is about; counts for its limit.

        Raises:
            DamagedInputError: a file turns out to be damaged.
        """
        limit = self.subset.limit
        if limit is None or not self.subset.chooses:
            yield from self._read(
                start, stop if limit is None else min(limit, limit if stop is None else stop)
            )
            return
        self.num_records_read = start
        if num_before >= limit:
            return
        for records in self._read(start, stop):
            if num_before + len(records) >= limit:
                self.num_records_read = records.positions[limit - num_before - 1] + 1
                yield records.between(start, self.num_records_read)
                return
            yield records
            num_before += len(records)

    def _read(self, start: int, stop: int | None) -> Iterator[Records]:
        first = 0
        for index, (file, count) in enumerate(zip(self.files, self.counts, strict=True)):
            if stop is not None and first >= stop:
                return
            known = self.file_rows.get(index) if count is None else count
            if known is not None and first + known <= start:
                first += known
                continue
            begin = max(0, start - first) if count is not None else 0
            is_cut = stop is not None and (count is None or first + count > stop)
            end = stop - first if is_cut and count is not None and stop is not None else None
            position = first + begin
            for rows in self._reader.rows(file, self.selection, begin, end):
                records = rows.moved(first).between(start, stop)
                position = max(position, first + rows.span.stop)
                self.num_records_read = position if stop is None else min(position, stop)
                if records.span:
                    yield records if self.sample is None else self.sample.of(records)
                if is_cut and count is None and self.num_records_read == stop:
                    return
            if count is not None and position - first != (count if end is None else end):
                raise file.broken(f"it states {count} rows, but has {position - first}")
            if count is None:
                self.file_rows[index] = position - first
            first = position
        self.num_records_read = first

    def _make_sample(self) -> Sample | None:
        size = self.subset.sample
        if size is None:
            return None
        total = self._count_all()
        if total is None and size >= 1:
            raise InputError(
                f"--sample {size:g} needs the number of records, which {self.format_name} files do not state",
                "Give a share, as in --sample 0.01.",
            )
        return Sample(size, self.subset.seed, total)

    def _count_all(self) -> int | None:
        counts = [count for count in self.counts if count is not None]
        return sum(counts) if len(counts) == len(self.counts) else None

    def count_records(self) -> int | None:
        """Return the number of positions that the job covers where it is known from the start, else None."""
        total, limit = self._count_all(), self.subset.limit
        if total is None or limit is None:
            return total
        return None if self.subset.chooses else min(total, limit)

    def check_fit(self) -> None:
        """Fail where the model would get numbers that torch does not have.

        Raises:
            InputError: with the column.
        """
        for name, (file, dtype) in self.unfit.items():
            if not self.selection.columns or name in self.selection.columns:
                raise InputError(
                    f"{file}: array {name!r} is {dtype}, which no model takes",
                    "Convert it, in the file or with --preprocess, or choose another with --column.",
                )

    def estimate_num_records(self) -> int | None:
        """Return the number of records: exact where files state it, else by bytes read so far."""
        if (exact := self.count_records()) is not None:
            return exact
        total = sum(file.num_bytes for file in self.files)
        done = sum(
            file.num_bytes if index in self.file_rows else file.num_bytes_read
            for index, file in enumerate(self.files)
        )
        read = self.num_records_read  # 0 while only headers have been read
        return int(read * total / done) if done and read else None

    @property
    def warnings(self) -> list[str]:
        """What a person should know of the files."""
        found = [text for file in self.files for text in file.warnings]
        listed = ", ".join(f"{count} {suffix}" for suffix, count in self.passed_over.items())
        return [*found, *([f"files that no reader takes were passed over: {listed}"] if listed else [])]

    def _inspect(self, file: InputFile) -> int | None:
        """Return the number of rows where it is known.

        Fails where a column that was asked for is in no row, instead of refusing every record later.
        """
        is_stdin = file.path == STDIN
        if self._reader.binary and (is_stdin or file.path.suffix.lower() in COMPRESSIONS):
            raise InputError(
                f"{file.name} cannot be read as {self.format_name}",
                "This format needs a plain, uncompressed file on disk.",
            )
        num_rows, names, unfit = Contents() if is_stdin else self._reader.inspect(file, self.selection)
        missing = [] if names is None else [name for name in self.selection.named if name not in names]
        if missing:
            listed = ", ".join(map(repr, (names or ())[:20])) or "none: leave --column and --id-column out"
            raise InputError(f"{file.name} has no column {missing[0]!r}", f"Its columns are {listed}.")
        self.unfit |= {name: (file.name, dtype) for name, dtype in unfit.items()}
        return num_rows


def _outside(folder: Path, files: list[Found]) -> list[Found]:
    found = outside(folder, files)
    if not found:
        raise InputError(
            f"All of the input lies in the output folder {folder}", "Name another folder for the output."
        )
    return found


def _expand(spec: str, passed_over: Counter[str]) -> list[Found]:
    if spec == str(STDIN):
        return [Found(STDIN, 0)]
    place = place_of(spec)
    try:
        if place.is_file():
            return [find(place)]
        if not is_remote(place) and place.exists() and not place.is_dir():
            # The fingerprint would drain a pipe before the job reads it.
            raise InputError(
                f"{spec} is no file on disk, and its contents can be read only once",
                "Send it to standard input, which is named -, or save it to a file.",
            )
        if (listed := _of_saved_dataset(place)) is not None:
            return listed
        found = _known_files(find_all(place), passed_over) or _matching(spec, place)
    except OSError as error:
        raise unreachable(spec, error) from error
    if not found:
        raise InputError(
            f"There is no input at {spec}", "Name a file, a folder of known files, a pattern, or -."
        )
    return found


def _of_saved_dataset(place: Path) -> list[Found] | None:
    """Return the files of a folder that `datasets` saved, None for other folders.

    There may be others beside them, which its functions have left.
    """
    names = names_in(place)
    if "dataset_dict.json" in names:
        with open_place(place / "dataset_dict.json") as file:
            splits = json.load(file)["splits"]
        raise InputError(
            f"{place} holds several splits", f"Name one: {', '.join(f'{place}/{s}' for s in splits)}."
        )
    if not {"state.json", "dataset_info.json"} <= set(names):
        return None
    with open_place(place / "state.json") as file:
        return [find(place / entry["filename"]) for entry in json.load(file)["_data_files"]]


def _known_files(files: list[Found], passed_over: Counter[str]) -> list[Found]:
    seen = [file for file in files if not file.path.name.startswith((".", "_"))]
    known = [file for file in seen if known_format(file.path) is not None]
    others = [file.path for file in seen if known_format(file.path) is None]
    passed_over.update(path.suffix.lower() or "without suffix" for path in others)
    return known


def _matching(spec: str, place: Path) -> list[Found]:
    """Return the files that a pattern names."""
    if is_remote(place):
        return [find(path) for path in find_matching(spec)]
    if place.exists():
        return []
    return [find(Path(path)) for path in sorted(glob.glob(spec, recursive=True)) if Path(path).is_file()]


def known_format(path: Path) -> str | None:
    """Return the format that the suffix of a file names, None where no reader takes it."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return _SUFFIXES.get(plain.suffix.lower())


def _format_of(file: InputFile) -> str:
    known = known_format(file.path)
    if known is None:
        raise InputError(
            f"The format of {file.name} is unknown",
            f"Name it with --input-format ({', '.join(FORMATS)}).",
        )
    return known
