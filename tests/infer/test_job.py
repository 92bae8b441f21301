"""Whole jobs: outputs, bad records, resumes, refusals, dry runs."""

from __future__ import annotations

import json
import re
import sys

import anyio
import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image

from asyncdp.errors import (
    DamagedInputError,
    JobError,
    JobUsageError,
    MissingExtraError,
    ModelLoadError,
    OutputExistsError,
    RecordError,
    ResumeRefusedError,
    TooManyBadRecordsError,
)
from asyncdp.infer import InferOptions, Job
from asyncdp.infer import job as job_module
from asyncdp.infer.output.journal import load_journal
from asyncdp.infer.report import memory
from asyncdp.infer.report.monitor import Monitor

pytestmark = pytest.mark.usefixtures("anyio_backend")


def rows(work, name="out"):
    return pyarrow.dataset.dataset(work / name, format="parquet").to_table().to_pylist()


def test_every_record_has_its_row_in_input_order(run, work, numbers):
    """Ids, order and values are right over batches, windows and shards."""
    summary = run(numbers(100), batch_size=7, window=16, shard_size=40)
    assert [row["id"] for row in rows(work)] == list(range(100))
    assert [row["total"] for row in rows(work)] == [index + 1.0 for index in range(100)]
    assert (summary.num_records, summary.num_bad, summary.files) == (100, 0, 3)


def test_order_of_completion_keeps_every_record(run, work, numbers):
    """With --order completion the rows of a shard may move, but none is lost or doubled."""
    run(numbers(50), batch_size=3, order="completion", shard_size=20)
    assert sorted(row["id"] for row in rows(work)) == list(range(50))


def test_models_run_in_inference_mode(run, work, numbers):
    """No lane keeps a graph for backward."""
    run(numbers(3), "models_for_tests:GradTeller")
    assert [row["output"] for row in rows(work)] == [True] * 3


@pytest.mark.parametrize("output_format", ["parquet", "safetensors"])
def test_a_format_whose_library_is_missing_is_refused_before_any_record(
    run, work, numbers, monkeypatch, output_format
):
    """Not after the first shard's worth of batches: nothing was made, and the error says what to install."""
    package = {"parquet": "pyarrow.parquet", "safetensors": "safetensors.numpy"}[output_format]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"{output_format} needs the package {package}.*Install"):
        run(numbers(5), output_format=output_format)
    assert not (work / "out").exists()


@pytest.mark.parametrize("output_format", ["jsonl", "npy", "safetensors"])
def test_output_formats_hold_ids_and_values(run, work, numbers, output_format):
    """Every format gives back ids and outputs."""
    run(numbers(5), output_format=output_format)
    path = work / "out" / f"part-000000.{output_format}"
    if output_format == "jsonl":
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        ids, totals = [entry["id"] for entry in entries], [entry["total"] for entry in entries]
    elif output_format == "npy":
        array = np.load(path)
        ids, totals = array["id"].tolist(), array["total"].tolist()
    else:
        tensors = safetensors.numpy.load_file(path)
        ids, totals = tensors["id"].tolist(), tensors["total"].tolist()
    assert ids == [0, 1, 2, 3, 4]
    assert totals == [1, 2, 3, 4, 5]


def test_an_empty_input_is_a_job_that_is_done(run, work):
    """Nothing in, nothing out, no error; and resuming it does nothing."""
    (work / "none.jsonl").write_text("")
    assert (run(work / "none.jsonl")).num_records == 0
    assert (run(work / "none.jsonl", resume=True)).files == 0


def test_stop_names_the_record(run, work, numbers):
    """By default a refused record ends the job, and the error says which and why."""
    with pytest.raises(RecordError, match=r"Record 13 \(.*numbers.jsonl:14\).*thirteen brings bad luck"):
        run(numbers(40), "models_for_tests:Picky")


def test_stop_names_the_broken_line(run, work, numbers):
    """A line that is no JSON ends the job with its position."""
    with pytest.raises(RecordError, match=r"Record 3 .*JSONDecodeError"):
        run(numbers(10, bad=[3]))


def test_skip_and_record(run, work, numbers):
    """With skip the bad are left out; with record they are stored with position, id and traceback."""
    path = numbers(40, bad=[3])
    skipped = run(path, "models_for_tests:Picky", on_error="skip")
    assert skipped.num_bad == 2
    assert [row["id"] for row in rows(work)] == [i for i in range(40) if i not in (3, 13)]
    run(path, "models_for_tests:Picky", on_error="record", output=work / "stored")
    stored = [
        json.loads(line) for line in (work / "stored" / "_errors-000000.jsonl").read_text().splitlines()
    ]
    assert [entry["position"] for entry in stored] == [3, 13]
    assert "thirteen brings bad luck" in stored[1]["traceback"]
    assert stored[0]["where"].endswith("numbers.jsonl:4")


def test_max_errors(run, work, numbers):
    """More bad records than allowed end the job; as many as allowed do not."""
    path = numbers(20, bad=[3, 4])
    assert (run(path, on_error="skip", max_errors=2)).num_bad == 2
    with pytest.raises(TooManyBadRecordsError, match="2 records were refused, more than the 1 allowed"):
        run(path, on_error="skip", max_errors=1, output=work / "other")


def test_out_of_memory_lowers_the_batch_size(run, work, numbers):
    """A model that has no memory for a batch gets smaller ones, and a warning says so."""
    monitor = Monitor()
    summary = run(numbers(64), "models_for_tests:Hungry", monitor, batch_size=16, on_error="skip")
    assert (summary.num_records, summary.num_bad) == (64, 0)
    assert any("going on with 4 per batch" in warning for warning in monitor.warnings)


@pytest.mark.parametrize(
    ("model", "match"),
    [("Ragged", "one row per record"), ("Shapeless", "outputs differ between batches")],
)
def test_outputs_that_are_no_rows(run, work, numbers, model, match):
    """A model whose outputs are no rows of one shape fails the job whatever --on-error says."""
    with pytest.raises(JobError, match=match):
        run(numbers(20), f"models_for_tests:{model}", on_error="skip", batch_size=4)


def test_own_functions(run, work):
    """Preprocess, collate and postprocess come from module:function."""
    (work / "a.txt").write_text("a\nb\nc\n")
    run(
        work / "a.txt",
        "models_for_tests:Lengths",
        columns=(),
        preprocess="models_for_tests:refuse_b",
        on_error="skip",
    )
    assert [(row["id"], row["output"]) for row in rows(work)] == [(0, 1), (2, 1)]


def test_collate_and_postprocess(run, work, numbers):
    """A collate may give keyword arguments; a postprocess may give a dict per record."""
    own = {"collate": "models_for_tests:double_batch", "postprocess": "models_for_tests:only_total"}
    run(numbers(3), columns=(), **own)
    assert [row["label"] for row in rows(work)] == ["sum 2", "sum 4", "sum 6"]


def test_worker_processes(run, work):
    """Preprocessing in processes gives what preprocessing in threads does."""
    (work / "a.txt").write_text("a\nbb\n")
    own = {"preprocess": "models_for_tests:shout", "worker_processes": True}
    run(work / "a.txt", "models_for_tests:Lengths", columns=(), **own)
    assert [row["output"] for row in rows(work)] == [1, 2]


def test_images(run, work):
    """A folder of images becomes tensors from 0 to 1; one that is none is a bad record."""
    (work / "pictures").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(work / "pictures" / "red.png")
    (work / "pictures" / "none.png").write_text("no picture")
    summary = run(work / "pictures", "models_for_tests:Means", columns=(), id_column="path", on_error="skip")
    (row,) = rows(work)
    assert row["output"] == [1.0, 0.0, 0.0]
    assert row["id"].endswith("red.png")
    assert summary.num_bad == 1


def test_dtype_and_autocast(run, work, numbers):
    """Weights and inputs are cast; bfloat16 outputs are written as float32."""
    run(numbers(2), "models_for_tests:linear", dtype="bfloat16")
    run(numbers(2), "models_for_tests:linear", autocast="bfloat16", output=work / "other")
    assert pq.read_schema(work / "out" / "part-000000.parquet").field("output").type.value_type == "float"
    np.testing.assert_allclose(
        [row["output"] for row in rows(work)], [row["output"] for row in rows(work, "other")], rtol=0.02
    )


def test_resume_after_a_stop_gives_the_same_output(run, work, numbers):
    """Blocks done before a failure are kept, and the rest is done once, bit for bit the same."""
    path = numbers(100)
    shape = {"shard_size": 10, "window": 5, "batch_size": 3}
    run(path, "models_for_tests:Picky", on_error="skip", output=work / "whole", **shape)
    with pytest.raises(RecordError):
        run(path, "models_for_tests:Picky", **shape)
    summary = run(path, "models_for_tests:Picky", on_error="skip", resume=True, **shape)
    assert summary.num_records == 100
    for whole in (work / "whole").glob("part-*"):
        assert (work / "out" / whole.name).read_bytes() == whole.read_bytes()


def test_resume_refuses_a_changed_job(run, work, numbers):
    """Another model, option or input is named, and nothing is touched."""
    path = numbers(10)
    run(path)
    with pytest.raises(ResumeRefusedError, match="batch_size was 32 and is 5"):
        run(path, resume=True, batch_size=5)
    with pytest.raises(ResumeRefusedError, match=r"model was .*Sums.* and is .*Picky"):
        run(path, "models_for_tests:Picky", resume=True)
    path.write_text(path.read_text().replace("1.0", "2.0"))
    with pytest.raises(ResumeRefusedError, match="input was"):
        run(path, resume=True)


def test_a_changed_file_among_many_is_named(run, work, numbers):
    """Of a long list of inputs only the changed one is named."""
    for index in range(30):
        numbers(2, name=f"n{index:02}.jsonl")
    run(str(work / "n*.jsonl"))
    numbers(3, name="n20.jsonl")
    with pytest.raises(ResumeRefusedError) as caught:
        run(str(work / "n*.jsonl"), resume=True)
    assert re.search(r'input was \[\["n20.jsonl", .* and is \[\["n20.jsonl"', str(caught.value))
    assert "n21" not in str(caught.value)


def test_weights_that_a_factory_draws_are_part_of_the_job(run, work, numbers):
    """A model with other weights at every start cannot continue its job."""
    path = numbers(3)
    run(path, "models_for_tests:linear")
    assert run(path, "models_for_tests:linear", resume=True).num_earlier == 3
    run(path, "models_for_tests:random_linear", output=work / "random")
    with pytest.raises(ResumeRefusedError, match="model weights was"):
        run(path, "models_for_tests:random_linear", output=work / "random", resume=True)


def test_a_damaged_shard_is_written_again(run, work, numbers):
    """Resuming checks every shard and repeats those that are missing or changed."""
    path = numbers(30)
    run(path, shard_size=10)
    before = {file.name: file.read_bytes() for file in (work / "out").glob("part-*")}
    (work / "out" / "part-000001.parquet").write_bytes(b"garbage")
    (work / "out" / "part-000002.parquet").unlink()
    monitor = Monitor()
    summary = run(path, shard_size=10, resume=True, monitor=monitor)
    assert (summary.num_records, summary.num_earlier) == (30, 10)
    assert {file.name: file.read_bytes() for file in (work / "out").glob("part-*")} == before
    assert "part-000001.parquet is missing or damaged" in monitor.warnings[0]


@pytest.mark.parametrize("num_kept", [0.999, 0.7, 0.5])
def test_a_truncated_journal_loses_no_record(run, work, numbers, num_kept):
    """A journal cut anywhere after its first line is trusted as far as it goes."""
    path = numbers(30)
    run(path, shard_size=10)
    journal = work / "out" / "_journal.jsonl"
    whole, said = journal.read_bytes(), load_journal(work / "out")
    first = whole.index(b"\n") + 1
    journal.write_bytes(whole[: first + int((len(whole) - first) * num_kept)])
    run(path, shard_size=10, resume=True)
    assert [row["id"] for row in rows(work)] == list(range(30))
    assert load_journal(work / "out") == said


def test_a_journal_without_its_first_line_is_refused(run, work, numbers):
    """The error says that the folder's job cannot be known."""
    path = numbers(5)
    run(path)
    (work / "out" / "_journal.jsonl").write_bytes(b"12 {}\n")
    with pytest.raises(ResumeRefusedError, match=r"first line .* is damaged"):
        run(path, resume=True)


def test_strays_of_a_crash_are_removed(run, work, numbers):
    """A half-written temporary file and a shard without a journal line do not survive a resume."""
    path = numbers(5)
    run(path)
    for name in (".tmp-part-000001.parquet", "part-000007.parquet"):
        (work / "out" / name).write_bytes(b"half")
    run(path, resume=True)
    assert sorted(file.name for file in (work / "out").glob("*part*")) == ["part-000000.parquet"]


def test_a_planted_link_is_not_followed(run, work, numbers):
    """A link in the place of a shard or its temporary file is replaced, and its target stays."""
    path = numbers(5)
    run(path)
    victim = work / "victim"
    victim.write_text("precious")
    for name in ("part-000000.parquet", ".tmp-part-000000.parquet"):
        (work / "out" / name).unlink(missing_ok=True)
        (work / "out" / name).symlink_to(victim)
    run(path, resume=True)
    assert victim.read_text() == "precious"
    assert not (work / "out" / "part-000000.parquet").is_symlink()


def test_ids_and_names_cannot_leave_the_folder(run, work):
    """No text of the input becomes a path: ids and column names with .. are mere data."""
    (work / "a.jsonl").write_text(json.dumps({"id": "../../evil", "x": [1.0, 2.0, 3.0]}) + "\n")
    run(work / "a.jsonl", id_column="id")
    assert rows(work)[0]["id"] == "../../evil"
    assert sorted(path.name for path in work.iterdir()) == ["a.jsonl", "out"]


def test_two_runs_cannot_share_an_output(run, work, numbers):
    """While one process holds the folder, another is refused."""
    import filelock

    (work / "out").mkdir()
    with filelock.FileLock(work / "out" / ".lock"), pytest.raises(JobUsageError, match="Another process"):
        run(numbers(3))


def test_output_that_exists(run, work, numbers):
    """A folder with something in it, or a file, is not written into."""
    (work / "out").mkdir()
    (work / "out" / "mine").write_text("x")
    with pytest.raises(OutputExistsError, match="not empty"):
        run(numbers(3))
    with pytest.raises(JobUsageError, match="is a file"):
        run(numbers(3), output=work / "out" / "mine")


def test_half_written_input_stops_the_job(run, work, numbers):
    """A compressed input that was cut short is an error, even where bad records are skipped."""
    import gzip

    path = work / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(numbers(5000).read_bytes())[:-10])
    with pytest.raises(DamagedInputError, match=r"rows.jsonl.gz cannot be read"):
        run(path, on_error="skip")


def test_output_inside_the_input_is_refused(run, work, numbers):
    """A job never reads its own shards; files of bookkeeping in an input folder are passed over."""
    (work / "data").mkdir()
    numbers(3, name="data/numbers.jsonl")
    with pytest.raises(JobUsageError, match="lies inside the input folder"):
        run(("data",), output=work / "data" / "out")
    (work / "data" / "_notes.jsonl").write_text("bookkeeping")
    assert run(("data",)).num_records == 3


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"model": "nothing"}, ModelLoadError, "no model nothing"),
        ({"model": "no_module_here:f"}, JobUsageError, "importing no_module_here failed"),
        ({"model": "models_for_tests:nothing"}, JobUsageError, "no attribute 'nothing'"),
        ({"model": "models_for_tests:broken_factory"}, ModelLoadError, "failed with KeyError"),
        ({"model": "models_for_tests:no_module"}, ModelLoadError, "returned int"),
        ({"model": "numbers.jsonl"}, ModelLoadError, "numbers.jsonl is no exported program .*--weights"),
        ({"model": "missing.pt2"}, ModelLoadError, "no model file missing.pt2"),
        ({"weights": "missing.safetensors"}, ModelLoadError, "no weights file"),
        ({"devices": "cuda:7"}, JobUsageError, "--devices: .*CUDA"),
        ({"devices": "toaster"}, JobUsageError, "--devices: .*toaster"),
        ({"batch_size": 0}, JobUsageError, "--batch-size is 0"),
        ({"max_errors": -1}, JobUsageError, "--max-errors is -1"),
        ({"on_error": "shrug"}, JobUsageError, "--on-error shrug is unknown"),
        ({"dtype": "int4"}, JobUsageError, "--dtype int4 is unknown"),
        ({"output_format": "lance"}, JobUsageError, "asyncdp merge --output-format lance"),
        ({"shard": "3/2"}, JobUsageError, "--shard 3/2 is no part"),
        ({"task": "embed"}, JobUsageError, "do not go together"),
        ({"collate": "models_for_tests:NOT_CALLABLE"}, JobUsageError, "is no function"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(run, work, numbers, options, error, match):
    """Each mistake has its own sentence, and no output folder is made."""
    with pytest.raises(error, match=match):
        run(numbers(3), **options)
    assert not (work / "out").exists()


def test_dry_run_writes_nothing(work, numbers, anyio_backend):
    """A plan names the lanes and the columns of the first batch, and leaves no file."""
    options = InferOptions((str(numbers(5)),), "models_for_tests:Sums", work / "out", columns=("x",))
    plan = anyio.run(Job(options).plan, backend=anyio_backend)
    assert plan.columns == {"total": "float32[]", "double": "float32[3]"}
    assert not (work / "out").exists()


def plan(anyio_backend, *inputs, model="models_for_tests:Sums", **options):
    options = InferOptions(tuple(map(str, inputs)), model, columns=("x",), **options)
    return anyio.run(Job(options).plan, backend=anyio_backend)


def test_dry_run_checks_the_resume(run, work, numbers, anyio_backend):
    """A dry run with resume reports what is done, and refuses what the run would refuse."""
    path, shape = numbers(30), {"output": work / "out", "shard_size": 10}
    run(path, shard_size=10)
    found = plan(anyio_backend, path, resume=True, **shape)
    assert (found.num_earlier, found.num_tried) == (30, 30)
    with pytest.raises(ResumeRefusedError, match="batch_size was 32 and is 5"):
        plan(anyio_backend, path, resume=True, batch_size=5, **shape)


def test_dry_run_tries_the_output_format(work, numbers, anyio_backend):
    """Outputs that the chosen format cannot hold are found before the job; only one batch is read."""
    names = {"postprocess": "models_for_tests:only_total", "output": work / "out"}
    assert plan(anyio_backend, numbers(40), **names).num_tried == 32
    with pytest.raises(JobError, match="Choose --output-format parquet or jsonl"):
        plan(anyio_backend, numbers(4), output_format="npy", **names)


def test_weights_in_safetensors(run, work, numbers):
    """Weights are loaded by name; those of another model are refused with the names."""
    import models_for_tests

    model = models_for_tests.linear()
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(0.5)
    safetensors.torch.save_file(model.state_dict(), work / "w.safetensors")
    run(numbers(2), "models_for_tests:linear", weights=str(work / "w.safetensors"))
    assert rows(work)[1]["output"] == [2.5, 2.5]
    with pytest.raises(ModelLoadError, match=r"do not fit.*scale"):
        run(numbers(2), weights=str(work / "w.safetensors"), output=work / "other")


def test_freed_memory_is_returned_while_a_job_runs(run, numbers, monkeypatch):
    """A job that lasts longer than a tick trims the heap; a C library that cannot is no error."""
    trimmed = []
    monkeypatch.setattr(job_module, "_TICK_SECONDS", 0.001)
    monkeypatch.setattr(job_module, "release_memory", lambda: trimmed.append(True))
    run(numbers(20), "models_for_tests:Slow", batch_size=10)
    assert trimmed
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.release_memory() is None
