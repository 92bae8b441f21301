"""All shards of a job have one schema, whatever each record's dict holds, and nothing of it vanishes."""

from __future__ import annotations

import json

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from asyncdp.errors import JobError
from asyncdp.infer.blocks import BlockRows
from asyncdp.infer.output.journal import load_journal
from asyncdp.infer.output.merge import merge_parts
from asyncdp.infer.output.output import OutputFolder
from asyncdp.infer.records import Record, Records
from asyncdp.infer.steps import to_columns

SINGLE = {"shard_size": 1, "window": 1, "batch_size": 1, "devices": "cpu", "columns": ()}
SINGLE |= {"collate": "models_for_tests:records_of"}
MODEL = "models_for_tests:Echo"


@pytest.fixture
def records(work):
    """Write dicts as JSONL; the model gives them back."""

    def records(*entries):
        (work / "in.jsonl").write_text("".join(json.dumps({"record": entry}) + "\n" for entry in entries))
        return work / "in.jsonl"

    return records


def read(folder):
    """Return the rows as the documentation reads them, without ids."""
    rows = pyarrow.dataset.dataset(folder, format="parquet").to_table().to_pylist()
    return [{name: value for name, value in row.items() if name != "id"} for row in rows]


def test_keys_that_the_first_record_lacks(run, work, records):
    """They are columns too, in one batch, in one shard and in one job."""
    path = records({"a": 1}, {"b": "x"}, {"a": 2, "c": [1.5]})
    expected = [
        {"a": 1, "b": None, "c": None},
        {"a": None, "b": "x", "c": None},
        {"a": 2, "b": None, "c": [1.5]},
    ]
    sizes = ({}, {"batch_size": 1}, {"shard_size": 1}, {"shard_size": 2, "batch_size": 1})
    for index, options in enumerate(sizes):
        out = work / f"out{index}"
        run(path, MODEL, output=out, **{**SINGLE, "shard_size": 8, "window": 8, "batch_size": 8, **options})
        assert read(out) == expected
        schemas = {str(pq.read_schema(shard)) for shard in out.glob("part-*")}
        assert len(schemas) == 1


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 0.5, None], "double"),
        ([None, 1, None], "int64"),
        ([None, "x"], "string"),
        ([[], [1], [0.5]], "list<item: double>"),
        ([[None], [{"a": 1}], [{"b": "x"}]], "list<item: struct<a: int64, b: string>>"),
        ([{"a": 1}, {"b": "x"}, None], "struct<a: int64, b: string>"),
    ],
)
def test_types_widen(run, work, records, values, kind):
    """A later shard of a wider type changes those before it, and no value is lost."""
    run(records(*({"v": value} for value in values)), MODEL, **SINGLE)
    assert {str(pq.read_schema(shard).field("v").type) for shard in (work / "out").glob("part-*")} == {
        kind.replace("item", "element")
        if "element" in str(pq.read_schema(next((work / "out").glob("part-*"))))
        else kind
    }
    found = [row["v"] for row in read(work / "out")]
    assert [without_nulls(value) for value in found] == [without_nulls(value) for value in values]


def without_nulls(value):
    if isinstance(value, dict):
        return {key: entry for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("values", [[1, "x"], [{"a": 1}, 5], [2**53 + 1, 0.5], [0.5, 2**53 + 1]])
def test_what_has_no_common_type_is_refused_by_name(run, work, records, values):
    """Also when it is resumed; the shard before, whichever was the first, stays as it is."""
    path = records(*({"v": value} for value in values))
    for _ in range(2):
        with pytest.raises(JobError, match=r"[cC]olumn 'v' .*in the shard that begins with record [01]\b"):
            run(path, MODEL, resume=True, **SINGLE)
    assert [row["v"] for row in read(work / "out")] in ([values[0]], [values[1]])
    state = load_journal(work / "out")
    with OutputFolder(work / "out", "parquet", state.fingerprint, resume=True) as output:
        assert (len(output.finished), output.warnings) == (1, [])


def test_parts_of_several_types_merge(run, work, records):
    """Each part finds its own types; the whole has those that hold both."""
    path = records({"a": 1}, {"a": 0.5, "b": "x"})
    parts = [work / "one", work / "two"]
    for index, part in enumerate(parts, 1):
        run(path, MODEL, output=part, shard=f"{index}/2", **SINGLE)
    merge_parts(parts, work / "whole")
    assert read(work / "whole") == [{"a": 1.0, "b": None}, {"a": 0.5, "b": "x"}]
    assert len({str(pq.read_schema(shard)) for shard in (work / "whole").glob("part-*")}) == 1
    merge_parts(parts, work / "whole")  # once more over what is there
    assert read(work / "whole") == [{"a": 1.0, "b": None}, {"a": 0.5, "b": "x"}]


def test_json_lines_have_the_columns_of_the_job(run, work, records):
    """A key that is missing is null, in shards before and after, and in those of other parts."""
    path = records({"b": 1, "a": [2**60]}, {"b": 3}, {"c": 0.1})
    run(path, MODEL, output_format="jsonl", **SINGLE)
    expected = [
        {"id": 0, "a": [2**60], "b": 1, "c": None},
        {"id": 1, "a": None, "b": 3, "c": None},
        {"id": 2, "a": None, "b": None, "c": 0.1},
    ]
    parts = [work / "one", work / "two"]
    for index, part in enumerate(parts, 1):
        run(path, MODEL, output_format="jsonl", output=part, shard=f"{index}/2", **SINGLE)
    merge_parts(parts, work / "whole")
    for folder in (work / "out", work / "whole"):
        lines = [json.loads(shard.read_text()) for shard in sorted(folder.glob("part-*"))]
        assert lines == expected
        assert [list(line) for line in lines] == [["id", "a", "b", "c"]] * 3


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_the_order_of_shards_changes_no_byte(work, order):
    """Which shard is finished first depends on the lanes; the folder does not."""
    entries = [{"b": 1, "a": {"y": 1}}, {"b": 0.5}, {"a": {"x": [1]}, "b": 2}]
    for name, turns in (("one", order), ("two", [0, 1, 2])):
        with OutputFolder(work / name, "parquet", {"shard_size": 1}, resume=False) as folder:
            for index in turns:
                rows = BlockRows(index)
                rows.add(Records.of([Record(index, index, None, "")]), to_columns([entries[index]], 1))
                folder.write_block(index, 1, rows, [])
    one, two = (
        [path.read_bytes() for path in sorted((work / name).glob("part-*"))] for name in ("one", "two")
    )
    assert one == two
