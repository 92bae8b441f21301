"""Inputs, outputs and models in stores: the same records, exactly once, whatever store they are in."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from asyncdp.errors import DamagedInputError, InputError, JobUsageError, OutputError, OutputExistsError
from asyncdp.infer import files, places
from asyncdp.infer.output import log
from asyncdp.infer.output.journal import load_journal
from asyncdp.infer.output.merge import merge_parts
from asyncdp.infer.readers import Selection, open_inputs

SHAPE = {"shard_size": 10, "window": 5, "batch_size": 2}

_NUMBERS = itertools.count()


@pytest.fixture(params=["memory", "s3"])
def store(request):
    """The URL of an empty folder in a store."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{next(_NUMBERS)}"
    return f"memory://bucket/{next(_NUMBERS)}"


def upload(path, url):
    with fsspec.open(url, "wb") as file:
        file.write(path.read_bytes())
    return url


def listing(url):
    """The names and contents of the files of a folder in a store."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name.rpartition("/")[2]: fs.cat_file(name) for name in fs.find(root)}


def shards(url):
    return {name: data for name, data in listing(url).items() if name.startswith("part-")}


def local_shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def test_a_job_from_store_to_store(run, work, numbers, store):
    """Its shards are those of a job from disk to disk; the summary and the journal are beside them."""
    path = numbers(35)
    run(path, output=work / "local", **SHAPE)
    url = upload(path, f"{store}/in/numbers.jsonl")
    summary = run(url, output=f"{store}/out", **SHAPE)
    assert (summary.num_records, summary.output) == (35, f"{store}/out")
    assert shards(f"{store}/out") == local_shards(work / "local")
    assert json.loads(listing(f"{store}/out")["_summary.json"])["num_records"] == 35
    with pytest.raises(OutputExistsError):
        run(url, output=f"{store}/out", **SHAPE)
    assert run(url, output=f"{store}/out", resume=True, **SHAPE).num_earlier == 35


def test_folders_patterns_and_compressed_files(numbers, store):
    """A folder is read by name, what begins with a dot or underscore and unknown files are left out."""
    data = numbers(3).read_bytes()
    for name, contents in {
        "b.jsonl": data,
        "a.jsonl.gz": gzip.compress(data),
        "_x.jsonl": b"no",
        "c.md": b"",
    }.items():
        with fsspec.open(f"{store}/in/deep/{name}", "wb") as file:
            file.write(contents)
    inputs = open_inputs([f"{store}/in"], None, Selection(("x",)))
    assert [file.path.name for file in inputs.files] == ["a.jsonl.gz", "b.jsonl"]
    assert inputs.passed_over == {".md": 1}
    assert [record.value[0] for record in inputs.read()] == [0, 1, 2] * 2
    (one,) = open_inputs([f"{store}/in/*/b.js*"], None, Selection(("x",))).files
    assert one.name == f"{store}/in/deep/b.jsonl"
    with pytest.raises(InputError, match=f"There is no input at {store}/nothing"):
        open_inputs([f"{store}/nothing"], None, Selection())


def files_of_all_formats(folder):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    pq.write_table(pa.table({"x": rows.tolist()}), folder / "a.parquet", row_group_size=2)
    np.save(folder / "a.npy", rows)
    np.savez(folder / "a.npz", x=rows)
    safetensors.torch.save_file({"x": torch.from_numpy(rows)}, folder / "a.safetensors")
    Image.fromarray(np.full((2, 2), 7, np.uint8)).save(folder / "a.png")
    return [folder / f"a.{suffix}" for suffix in ("parquet", "npy", "npz", "safetensors", "png")]


def test_every_format_reads_from_a_store(run, work, store):
    """A file in a store gives what it gives on a disk."""
    for path in files_of_all_formats(work):
        url = upload(path, f"{store}/{path.name}")
        options = {"columns": () if path.suffix in (".npy", ".png") else ("x",), "output_format": "jsonl"}
        model = "models_for_tests:Means" if path.suffix == ".png" else "models_for_tests:Sums"
        run(path, model, output=work / path.suffix, **options)
        run(url, model, output=f"{store}/out-{path.name}", **options)
        assert shards(f"{store}/out-{path.name}") == local_shards(work / path.suffix)


def test_a_damaged_file_in_a_store_is_named(run, work, store):
    """As one on a disk is."""
    paths = files_of_all_formats(work)[:4]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-20])
        url = upload(path, f"{store}/{path.name}")
        with pytest.raises(DamagedInputError, match=f"{url} cannot be read"):
            run(url, columns=(), output=work / "out")


def test_models_and_weights_by_url(run, work, numbers):
    """They are copied to the disk, and known by their contents."""
    path, store = numbers(5), "memory://bucket/models"
    rows = torch.export.Dim("rows", min=1, max=1024)
    linear = torch.nn.Linear(3, 2)
    program = torch.export.export(linear, (torch.zeros(2, 3),), dynamic_shapes=({0: rows},))
    torch.export.save(program, work / "m.pt2")
    safetensors.torch.save_file(dict(linear.state_dict()), work / "w.safetensors")
    run(path, upload(work / "m.pt2", f"{store}/m.pt2"))
    assert run(path, "m.pt2", resume=True).num_earlier == 5
    weights = upload(work / "w.safetensors", f"{store}/w.safetensors")
    run(path, "models_for_tests:linear", weights=weights, output=work / "other")
    with pytest.raises(InputError, match=f"There is nothing at {store}/no.pt2"):
        run(path, f"{store}/no.pt2", output=work / "third")


def test_an_encoder_folder_by_url(run, work, s3, encoder_folder):
    """All of its files are copied."""
    for path in encoder_folder.iterdir():
        upload(path, f"{s3}/encoder/{path.name}")
    (work / "t.jsonl").write_text('{"x": "one two"}\n{"x": "three"}\n')
    run(work / "t.jsonl", f"{s3}/encoder", task="embed")
    run(work / "t.jsonl", str(encoder_folder), task="embed", output=work / "other")
    assert local_shards(work / "out") == local_shards(work / "other")


class Killed(BaseException):
    """Ends a job where it stands, without the cleaning up that an error sees."""


@pytest.fixture
def killed_at(monkeypatch):
    """A context in which the job is killed at its n-th put, before or after the store has taken it."""
    put, modules = places.put, (log, files)

    @contextlib.contextmanager
    def killed_at(number, *, before):
        calls = itertools.count(1)

        def counting(place, data, **options):
            is_last = next(calls) == number
            if is_last and before:
                raise Killed
            tag = put(place, data, **options)
            if is_last:
                raise Killed
            return tag

        with monkeypatch.context() as patch:
            for module in modules:
                patch.setattr(module, "put", counting)
            yield

    return killed_at


def test_a_kill_at_any_put_loses_and_repeats_nothing(run, work, numbers, store, killed_at):
    """Whatever was being put when the process was killed, a resume gives the undisturbed output."""
    path, out = numbers(40), f"{store}/out"
    run(path, output=work / "whole", **SHAPE)
    for number, before in itertools.product((1, 2, 3), (True, False)):
        with killed_at(number, before=before), pytest.raises(Killed):
            run(path, output=out, resume=True, **SHAPE)
    assert run(path, output=out, resume=True, **SHAPE).num_records == 40
    assert shards(out) == local_shards(work / "whole")
    assert sum(block.num_records for block in load_journal(places.place_of(out)).blocks.values()) == 40


def test_a_second_writer_ends_the_first(run, numbers, store, monkeypatch):
    """The job that took over last goes on; the one before fails at its next line, and nothing is doubled."""
    path, out = numbers(40), f"{store}/out"
    append, calls = log._ObjectLog.append, itertools.count(1)

    def interrupted(self, line):
        if next(calls) == 3:  # the first job has one block in the journal, and the shard of the next one put
            monkeypatch.setattr(log._ObjectLog, "append", append)
            second = run(path, output=out, resume=True, **SHAPE)
            assert (second.num_earlier, second.num_records) == (10, 40)
        append(self, line)

    monkeypatch.setattr(log._ObjectLog, "append", interrupted)
    with pytest.raises(JobUsageError, match=f"Another process is writing into {out}"):
        run(path, output=out, **SHAPE)
    assert len(shards(out)) == 4
    assert run(path, output=out, resume=True, **SHAPE).num_earlier == 40


def test_the_first_writer_replaces_no_shard_of_the_second(run, numbers, store, monkeypatch):
    """It finds that there is one already, and then that the folder is no longer its own."""
    path, out = numbers(20), f"{store}/out"
    begin = log._ObjectLog.begin

    def overtaken(self, data, number):
        begin(self, data, number)
        monkeypatch.setattr(log._ObjectLog, "begin", begin)
        run(path, output=out, resume=True, **SHAPE)
        written.update(shards(out))

    written = {}
    monkeypatch.setattr(log._ObjectLog, "begin", overtaken)
    with pytest.raises(JobUsageError, match="Another process is writing"):
        run(path, output=out, **SHAPE)
    assert shards(out) == written


def test_a_damaged_shard_in_a_store_is_written_again(run, work, numbers, store):
    """One that was replaced or removed is found by the store's own digest of it, or by its contents."""
    path, out = numbers(30), f"{store}/out"
    run(path, output=out, **SHAPE)
    whole = shards(out)
    with fsspec.open(f"{out}/part-000001.parquet", "wb") as file:
        file.write(b"x" * len(whole["part-000001.parquet"]))
    fs, root = fsspec.core.url_to_fs(out)
    fs.rm_file(f"{root}/part-000002.parquet")
    assert run(path, output=out, resume=True, **SHAPE).num_earlier == 10
    assert shards(out) == whole


def test_parts_in_stores_and_on_disks_merge_anywhere(run, work, numbers, store):
    """A part may lie in a store, another on a disk, the whole in either."""
    path = numbers(35)
    run(path, output=work / "whole", **SHAPE)
    run(path, output=f"{store}/one", shard="1/2", **SHAPE)
    run(path, output=work / "two", shard="2/2", **SHAPE)
    for target in (work / "merged", f"{store}/merged"):
        assert merge_parts([f"{store}/one", str(work / "two")], target).num_records == 35
    assert shards(f"{store}/merged") == local_shards(work / "merged") == local_shards(work / "whole")
    assert run(path, output=f"{store}/merged", resume=True, **SHAPE).num_earlier == 35


def test_a_changed_input_in_a_store_is_seen(run, numbers, store):
    """By the store's digest where it has one, else by the contents."""
    url = upload(numbers(5), f"{store}/numbers.jsonl")
    run(url)
    assert run(url, resume=True).num_earlier == 5
    upload(numbers(5, bad=(1,)), url)
    with pytest.raises(JobUsageError, match=r"input was .*numbers.jsonl"):
        run(url, resume=True)


def test_what_cannot_be_reached_is_said_with_the_remedy(run, work, numbers, s3, monkeypatch):
    """A driver that is missing is named, and so is a bucket that is not there, before anything runs."""
    with pytest.raises(JobUsageError, match=r"gs://b/x needs a driver .*gcsfs.* Install"):
        open_inputs(["gs://b/x"], None, Selection())
    with pytest.raises(JobUsageError, match=r"nonsense://b/x cannot be reached"):
        run(numbers(1), output="nonsense://b/x")
    with pytest.raises(OutputError, match=r"s3://missing/out.* cannot be written"):
        run(numbers(1), output="s3://missing/out")
    with pytest.raises(InputError, match=r"There is no input at s3://missing/in"):
        run("s3://missing/in")
    with pytest.raises(JobUsageError, match=r"lies inside the input folder s3://bucket/data"):
        run("s3://bucket/data", output="s3://bucket/data/out")
