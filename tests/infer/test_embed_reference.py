"""Vectors of folders of sentence-transformers are those that the library itself computes."""

from __future__ import annotations

import json

import hf_folders
import numpy as np
import pytest
import torch
from hf_folders import TEXTS

from asyncdp.errors import JobUsageError, ModelLoadError
from asyncdp.infer.model.models import load_model
from asyncdp.infer.model.quantize import Quantize, read_ranges
from asyncdp.infer.model.task_options import TaskOptions

library = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import modules  # noqa: E402

MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    hf_folders.bert(folder)
    return folder


@pytest.fixture
def save(work, encoder):
    """Save a model of sentence-transformers made of these modules; return its folder and the model."""

    def save(*behind, pooling="mean", include_prompt=True, settings=None, max_seq_length=None, **others):
        torch.manual_seed(1)
        first = modules.Transformer(str(encoder), max_seq_length=max_seq_length, **others)
        pooled = modules.Pooling(16, pooling_mode=pooling, include_prompt=include_prompt)
        model = library.SentenceTransformer(modules=[first, pooled, *behind], device="cpu", **settings or {})
        model.save(str(work / "model"), create_model_card=False)
        return work / "model", model

    return save


def vectors(folder, **options):
    """Compute what a job stores, batch by batch."""
    loaded = load_model(str(folder), TaskOptions(**options))
    steps, found = loaded.steps, []
    for texts in (TEXTS[:4], TEXTS[4:]):
        items = steps.preprocess(texts)
        output = loaded.module(**steps.collate(items))
        found += [*(steps.finish(output, items) if steps.finish else output)["embedding"]]
    return np.stack(found)


def expected(model, **settings):
    return model.encode(TEXTS, batch_size=3, show_progress_bar=False, **settings)


def test_a_job(save, run, work):
    """A whole job without --task, which the folder decides."""
    folder, model = save(pooling="cls")
    (work / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    run(work / "t.jsonl", str(folder), columns=("text",), batch_size=2, precision="binary")
    found = hf_folders.columns(work / "out")["embedding"]
    assert found == expected(model, precision="binary").tolist()


@pytest.mark.parametrize("pooling", ["cls", "weightedmean", MODES], ids=str)
def test_every_pooling(save, pooling):
    """Each mode and several of them side by side; nothing is scaled that the folder does not scale."""
    folder, model = save(pooling=pooling)
    np.testing.assert_allclose(vectors(folder, task="embed"), expected(model), atol=1e-5)


def test_layers_behind_the_pooling(save):
    """Dense with and without its extras, LayerNorm and Normalize run in the folder's order."""
    dense = modules.Dense(16, 12, activation_function=torch.nn.GELU(), use_residual=True)
    plain = modules.Dense(12, 10, bias=False, activation_function=torch.nn.Identity())
    folder, model = save(dense, modules.LayerNorm(12), plain, modules.Dropout(0.5), modules.Normalize())
    np.testing.assert_allclose(vectors(folder), expected(model), atol=1e-5)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts(save, include_prompt):
    """A prompt by name stands before every text, and stays out of the pooling where the folder says so."""
    settings = {"prompts": {"query": "dogs and foxes: ", "other": "Bob"}, "default_prompt_name": "other"}
    folder, model = save(pooling=MODES, include_prompt=include_prompt, settings=settings)
    found = vectors(folder, prompt_name="query")
    np.testing.assert_allclose(found, expected(model, prompt_name="query"), atol=1e-5)


def test_the_default_prompt_and_one_of_ones_own(save):
    """Without an option the folder's default holds; an empty prompt is none."""
    folder, model = save(settings={"prompts": {"query": "the fox "}, "default_prompt_name": "query"})
    for given in ({}, {"prompt": "Berlin "}, {"prompt": ""}):
        np.testing.assert_allclose(vectors(folder, **given), expected(model, **given), atol=1e-5)


def test_an_unknown_prompt_is_refused(save):
    """With the names that there are."""
    folder, _ = save(settings={"prompts": {"query": "q: "}})
    with pytest.raises(JobUsageError, match=r"no such prompt. It has .*query"):
        vectors(folder, prompt_name="quary")


def test_length_and_case_of_an_older_folder(save):
    """`max_seq_length` cuts texts, `do_lower_case` lowers them, and pooling is told by flags."""
    folder, _ = save()
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": true}')
    flags = {"word_embedding_dimension": 16, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    np.testing.assert_allclose(vectors(folder), expected(model), atol=1e-5)


@pytest.mark.parametrize("by_option", [True, False])
def test_truncated_dimensions(save, by_option):
    """The first entries are kept, by option or as the folder says."""
    folder, model = save(modules.Normalize(), settings={} if by_option else {"truncate_dim": 5})
    found = vectors(folder, **({"truncate_dim": 5} if by_option else {}))
    assert found.shape == (len(TEXTS), 5)
    np.testing.assert_allclose(found, expected(model, truncate_dim=5), atol=1e-5)


def test_precision(save, work):
    """Quantised vectors are those of `quantize_embeddings`, with ranges from the vectors that are given."""
    folder, model = save(modules.Normalize())
    plain = expected(model)
    np.save(work / "some.npy", plain[:5])
    np.testing.assert_allclose(vectors(folder, precision="float32"), plain, atol=1e-5)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        calibration = {"calibration": str(work / "some.npy")} if "int8" in precision else {}
        found = vectors(folder, precision=precision, **calibration)
        wanted = library.quantize_embeddings(plain, precision, calibration_embeddings=plain[:5])
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        # The greatest value is an edge, and the last bits of vectors differ.
        assert np.abs(found.astype(int) - wanted).max() <= (0 if "binary" in precision else 1)
        ranges = read_ranges(work / "some.npy", 16) if calibration else None
        exactly = Quantize(precision, ranges)({"embedding": torch.from_numpy(plain)}, [])["embedding"]
        np.testing.assert_array_equal(exactly, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate_dim": 17}, "beyond the vectors' 16 entries"),
        ({"precision": "int8"}, "do not go together"),
        ({"precision": "binary", "calibration": "x.npy"}, "do not go together"),
        ({"precision": "int8", "calibration": "x.npy"}, "x.npy cannot be read"),
        ({"precision": "int8", "calibration": "few.npy"}, r"holds float32\[2, 3\], not vectors"),
        ({"prompt": "a", "prompt_name": "b"}, "are both given"),
        ({"aggregation": "simple"}, "--aggregation has no effect with --task embed"),
        ({"task": "classify"}, "lacks weights|ForSequenceClassification"),
    ],
)
def test_options_that_do_not_fit(run, work, encoder, options, message):
    """They are told before any record is run."""
    np.save(work / "few.npy", np.zeros((2, 3), np.float32))
    (work / "t.txt").write_text("a text\n")
    with pytest.raises((JobUsageError, ModelLoadError), match=message):
        run(work / "t.txt", str(encoder), columns=(), **{"task": "embed", **options})
    assert not (work / "out").exists()
