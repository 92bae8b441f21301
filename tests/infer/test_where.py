"""Which records a job is about: a condition, a sample, a limit, alone, together, in parts and resumed."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from asyncdp.errors import InputError, JobUsageError, RecordError, ResumeRefusedError
from asyncdp.infer.output.merge import merge_parts
from asyncdp.infer.readers import Selection, open_inputs
from asyncdp.infer.records import Records
from asyncdp.infer.where import Sample, Subset, Where

SHAPE = {"shard_size": 10, "window": 5, "batch_size": 2}
PRICES = [None if index % 7 == 3 else float(index) for index in range(100)]
LANGUAGES = ["de" if index % 3 else "fr" for index in range(100)]


@pytest.fixture(params=["parquet", "jsonl", "csv", "npz"])
def data(request, work):
    """A hundred records with x, price and lang in a format."""
    path = work / f"rows.{request.param}"
    x = [[float(index), 1.0, 0.0] for index in range(100)]
    rows = [{"x": a, "price": b, "lang": c} for a, b, c in zip(x, PRICES, LANGUAGES, strict=True)]
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    elif request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif request.param == "csv":
        lines = [f"{'' if row['price'] is None else row['price']},{row['lang']}" for row in rows]
        path.write_text("\n".join(["price,lang", *lines]) + "\n")
    else:
        prices = [np.nan if price is None else price for price in PRICES]
        np.savez(path, x=np.array(x, np.float32), price=np.array(prices), lang=np.array(LANGUAGES))
    return path


def positions(path, subset=None, start=0, stop=None, columns=()):
    where = subset.where if subset else None
    inputs = open_inputs([str(path)], None, Selection(columns, where=where), subset=subset)
    return [record.position for record in inputs.read(start, stop)]


def ids(folder):
    return pyarrow.dataset.dataset(folder, format="parquet").to_table(columns=["id"])["id"].to_pylist()


def expected(least, language):
    pairs = enumerate(zip(PRICES, LANGUAGES, strict=True))
    return [i for i, (price, lang) in pairs if price is not None and price > least and lang == language]


def test_one_condition_on_every_format(data):
    """The same records fulfil it, whatever they are stored in; what is missing does not."""
    price = "if_else(price == '', '-1', price).cast('float64')" if data.suffix == ".csv" else "price"
    where = Where.of(f"{price} > 41.5 and lang == 'de'")
    assert positions(data, Subset(where)) == expected(41.5, "de")
    assert positions(data, Subset(where), 40, 60) == [i for i in expected(41.5, "de") if i < 60]
    if data.suffix != ".csv":
        assert positions(data, Subset(where), columns=("x",)) == expected(41.5, "de")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("n > 3", [4, 5]),
        ("1 <= n < 3", [1, 2]),
        ("n in [0, 5] or s == 'c'", [0, 2, 5]),
        ("not (n in (0, 1, 2))", [3, 4, 5]),
        ("n not in {0, 1, 2} and s is not None", [3, 5]),
        ("s is None", [4]),
        ("pc.field('n') * 2 + 1 == 7", [3]),
        ("(field('n') > 3) & ~(field('s') == 'f')", []),
        ("pc.match_substring(s, 'b') | (n == -1)", [1]),
        ("utf8_upper(s) == 'A'", [0]),
        ("cast(s, 'string').isin(['a', 'f'])", [0, 5]),
        ("day >= date('2024-01-05')", [4, 5]),
        ("n.is_valid() and flag", [0, 2, 4]),
    ],
)
def test_what_conditions_may_hold(work, text, wanted):
    """Comparisons, logic, arithmetic, membership, null, dates, and Arrow's functions of one row."""
    days = pa.array([f"2024-01-0{day}" for day in range(1, 7)]).cast(pa.date32())
    flags = [True, False] * 3
    table = {"n": range(6), "s": ["a", "b", "c", "d", None, "f"], "day": days, "flag": flags}
    pq.write_table(pa.table(table), work / "t.parquet", row_group_size=4)
    assert positions(work / "t.parquet", Subset(Where.of(text))) == wanted


@pytest.mark.parametrize(
    "text",
    ["n >", "3 > 2", "__import__('os').system('x')", "sum(n) > 3", "n.__class__", "[i for i in n]", "f(n)"],
)
def test_what_is_no_condition_is_refused(run, numbers, text):
    """Before anything runs; nothing of it is run as Python."""
    with pytest.raises(JobUsageError, match=r"--where .* cannot be read: .*Write it as in Python"):
        run(numbers(3), where=text)


def test_a_condition_on_the_statistics_reads_no_other_row_groups(work, monkeypatch):
    """Row groups that cannot hold a record that fulfils it are left where they are."""
    path = work / "rows.parquet"
    pq.write_table(pa.table({"n": range(100)}), path, row_group_size=10)
    read = []
    iterate = pq.ParquetFile.iter_batches

    def noted(self, size, *, row_groups, columns):
        read.extend(row_groups)
        return iterate(self, size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    assert positions(path, Subset(Where.of("n > 37 and n < 42"))) == [38, 39, 40, 41]
    assert read == [3, 4]


def test_no_record_gets_its_type_from_a_neighbour(work):
    """A large whole number beside fractions is compared as it is; what cannot be compared is a bad record."""
    rows = [2**53 + 1, 0.5, 2**53, "text", None]
    (work / "t.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in rows))
    where = Where.of(f"n > {2**53}")
    inputs = open_inputs([str(work / "t.jsonl")], None, Selection(where=where), subset=Subset(where))
    records = list(inputs.read())
    assert [record.position for record in records] == [0, 3]
    assert "--where" in str(records[1].error)


def test_a_condition_that_does_not_fit_the_columns(run, work):
    """A column that is missing, or of a type that cannot be compared so, is said with the remedy."""
    pq.write_table(pa.table({"x": [[1.0, 2.0, 3.0]], "s": ["a"]}), work / "t.parquet")
    with pytest.raises(InputError, match=r"no column 'price'"):
        run(work / "t.parquet", where="price > 3")
    with pytest.raises(
        JobUsageError, match=r"--where s > 3 does not fit .*t.parquet: .*cast\(price, 'float64'\)"
    ):
        run(work / "t.parquet", where="s > 3")
    (work / "t.csv").write_text("x,s\n1,a\n")
    with pytest.raises(RecordError, match=r"cast\(price, 'float64'\)"):
        run(work / "t.csv", output=work / "other", where="s > 3")


def test_a_value_that_cannot_be_converted_is_a_bad_record(run, work):
    """In Parquet as in JSON: those around it are read."""
    values = ["1", "x", "30"]
    pq.write_table(pa.table({"x": [[1.0, 2.0, 3.0]] * 3, "s": values}), work / "t.parquet")
    for index, options in enumerate(({"keep": ("s",)}, {})):
        out = work / f"out{index}"
        summary = run(
            work / "t.parquet", output=out, where="cast(s, 'int64') > 3", on_error="record", **options
        )
        assert (summary.num_records, summary.num_bad, ids(out)) == (2, 1, [2])


CHOICES = [
    {"where": "price > 20 and lang == 'de'"},
    {"sample": 0.3},
    {"sample": 0.3, "sample_seed": 7},
    {"sample": 0.5, "where": "lang == 'fr'"},
    {"limit": 33},
]


@pytest.fixture
def rows(work):
    def make(kind):
        x = [[float(index), 1.0, 0.0] for index in range(100)]
        table = pa.table({"x": x, "price": PRICES, "lang": LANGUAGES})
        if kind == "jsonl":
            (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        else:
            pq.write_table(table, work / "rows.parquet", row_group_size=15)
        return work / f"rows.{kind}"

    return make


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("choice", CHOICES)
def test_parts_of_a_choice_merge_into_the_whole(run, work, rows, choice, kind):
    """Counts, ids and files are those of the undivided job; a resume finds all done, or another choice."""
    path = rows(kind)
    whole = run(path, output=work / "whole", **SHAPE, **choice)
    assert ids(work / "whole") == positions(
        path,
        Subset(
            Where.of(choice["where"]) if "where" in choice else None,
            choice.get("sample"),
            choice.get("sample_seed", 0),
            choice.get("limit"),
        ),
    )
    assert whole.num_records == len(ids(work / "whole"))
    parts = [work / "a", work / "b"]
    counts = [
        run(path, output=p, shard=f"{i}/2", **SHAPE, **choice).num_records for i, p in enumerate(parts, 1)
    ]
    assert sum(counts) == whole.num_records
    assert merge_parts(parts, work / "merged").num_records == whole.num_records
    contents = [{p.name: p.read_bytes() for p in (work / n).glob("part-*")} for n in ("whole", "merged")]
    assert contents[0] == contents[1]
    assert run(path, output=work / "whole", resume=True, **SHAPE, **choice).num_earlier == whole.num_records
    with pytest.raises(ResumeRefusedError, match=r"(where|sample|sample_seed|limit) was"):
        run(path, output=work / "whole", resume=True, **SHAPE)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_limit_counts_what_was_chosen(run, work, rows, kind):
    """The first records that fulfil the condition, also where shards of them are lost and written again."""
    path, choice = rows(kind), {"where": "lang == 'de'", "limit": 21, **SHAPE}
    assert run(path, output=work / "out", **choice).num_records == 21
    wanted = [index for index, language in enumerate(LANGUAGES) if language == "de"][:21]
    assert ids(work / "out") == wanted
    (work / "out" / "part-000001.parquet").unlink()
    assert run(path, output=work / "out", resume=True, **choice).num_records == 21
    assert ids(work / "out") == wanted
    with pytest.raises(JobUsageError, match="--limit beside --where"):
        run(path, output=work / "part", shard="1/2", **choice)


def test_a_sample_of_a_number(run, work, rows):
    """Exactly so many; formats that do not state their number of records need a share."""
    assert run(rows("parquet"), output=work / "out", sample=17, **SHAPE).num_records == 17
    with pytest.raises(InputError, match="Give a share"):
        run(rows("jsonl"), output=work / "other", sample=17)
    with pytest.raises(JobUsageError, match="neither a share nor a number"):
        run(rows("jsonl"), output=work / "other", sample=1.5)


def test_samples_are_even_and_differ_by_seed():
    """A share is about that share of any range, another seed gives another sample."""
    samples = [Sample(0.1, seed) for seed in range(3)]
    every = Records(range(20_000), range(20_000), range(20_000), range(20_000))
    held = [set(sample.of(every).positions) for sample in samples]
    assert all(1_800 < len(each) < 2_200 for each in held)
    assert len(held[0] & held[1]) < 400


def test_a_dry_run_tries_records_that_were_chosen(work, rows):
    """Its first batch holds none of those that are left out."""
    import anyio

    from asyncdp.infer import InferOptions, Job

    options = InferOptions(
        (str(rows("parquet")),), "models_for_tests:Sums", work / "out", columns=("x",), where="price > 90"
    )
    plan = anyio.run(Job(options).plan)
    assert (plan.num_tried, plan.num_records) == (len([p for p in PRICES if p and p > 90]), None)
