"""Classes, entities and scores of pairs are those of transformers' pipelines and of sentence-transformers."""

from __future__ import annotations

import io
import json

import hf_folders
import numpy as np
import pytest
import torch
from hf_folders import TEXTS

from asyncdp.errors import JobUsageError, ModelLoadError

transformers = pytest.importorskip("transformers")

LABELS = {"id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}
PAIRS = [(TEXTS[index], TEXTS[-1 - index]) for index in range(len(TEXTS))]


@pytest.fixture
def results(run, work):
    """Run a job over the texts and their pairs; return its columns."""

    def results(folder, *columns, **options):
        rows = [{"text": text, "other": other} for text, other in PAIRS]
        (work / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run(work / "t.jsonl", str(folder), columns=columns or ("text",), batch_size=3, **options)
        return hf_folders.columns(work / "out")

    return results


def check(found, wanted):
    assert found["label"] == [each["label"] for each in wanted]
    np.testing.assert_allclose(found["score"], [each["score"] for each in wanted], atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        LABELS,
        {**LABELS, "problem_type": "multi_label_classification"},
        {**LABELS, "problem_type": "regression"},
        {"num_labels": 1},
    ],
    ids=["classes", "several", "regression", "one"],
)
def test_classes_of_texts(results, tmp_path, settings):
    """Label, score and logits, whatever function the folder's settings ask for."""
    model = hf_folders.bert(tmp_path / "m", "BertForSequenceClassification", **settings)
    found = results(tmp_path / "m", task="classify")
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "m"), device="cpu")
    check(found, pipeline(TEXTS, truncation=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    logits = [
        model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0].tolist() for text in TEXTS
    ]
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)


def test_classes_of_pairs(results, tmp_path):
    """Two columns are a pair; the folder decides for this task by itself."""
    hf_folders.bert(tmp_path / "m", "BertForSequenceClassification", **LABELS)
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "m"), device="cpu")
    wanted = pipeline([{"text": a, "text_pair": b} for a, b in PAIRS], truncation=True)
    check(results(tmp_path / "m", "text", "other"), wanted)


def test_a_decoder_classifies(results, tmp_path):
    """The head of a decoder finds the last token of each text."""
    tokenizer = hf_folders.save_tokenizer(tmp_path / "m")
    settings = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "vocab_size": len(tokenizer)}
    settings |= {"bos_token_id": 2, "eos_token_id": 3}
    hf_folders.save_model(tmp_path / "m", "GPT2ForSequenceClassification", "GPT2Config", **settings, **LABELS)
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "m"), device="cpu")
    check(results(tmp_path / "m"), pipeline(TEXTS, truncation=True))


@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_entities(results, tmp_path, aggregation):
    """Every aggregation of the pipeline, with offsets into the text."""
    names = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    hf_folders.bert(tmp_path / "m", "BertForTokenClassification", id2label=names, num_labels=5)
    found = results(tmp_path / "m", aggregation=aggregation)["entities"]
    pipeline = transformers.pipeline(
        "token-classification", str(tmp_path / "m"), aggregation_strategy=aggregation, device="cpu"
    )
    short = [index for index, text in enumerate(TEXTS) if len(pipeline.tokenizer(text)["input_ids"]) < 24]
    assert len(short) >= 5
    for index in short:
        wanted = pipeline(TEXTS[index])
        assert len(found[index]) == len(wanted)
        for entity, other in zip(found[index], wanted, strict=True):
            assert entity.pop("score") == pytest.approx(float(other.pop("score")), abs=1e-5)
            assert entity == other


def test_a_long_text_loses_no_entity(run, work):
    """A text of several times the model's length is read in windows, as the pipeline does by a stride."""
    hf_folders.bert(
        work / "m", "BertForTokenClassification", id2label={0: "A", 1: "B"}, label2id={"A": 0, "B": 1}
    )
    text = " ".join(TEXTS[:6] * 3)
    (work / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    run(work / "t.jsonl", str(work / "m"), columns=("text",), aggregation="simple")
    (found,) = hf_folders.columns(work / "out")["entities"]
    pipeline = transformers.pipeline(
        "token-classification", str(work / "m"), aggregation_strategy="simple", stride=6, device="cpu"
    )
    assert [(e["start"], e["end"], e["word"]) for e in found] == [
        (e["start"], e["end"], e["word"]) for e in pipeline(text)
    ]
    assert found[-1]["end"] > 500


@pytest.mark.parametrize(
    "settings",
    [
        {"num_labels": 1},
        {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"num_labels": 3},
        {"num_labels": 1, "sbert_ce_default_activation_function": "torch.nn.Tanh"},
    ],
    ids=["one", "named", "three", "older"],
)
def test_scores_of_pairs(results, tmp_path, settings):
    """Scores are those that a cross encoder predicts."""
    library = pytest.importorskip("sentence_transformers")
    hf_folders.bert(tmp_path / "m", "BertForSequenceClassification", **settings)
    encoder = library.CrossEncoder(str(tmp_path / "m"), device="cpu", local_files_only=True)
    found = results(tmp_path / "m", "text", "other", task="rerank")["score"]
    np.testing.assert_allclose(found, encoder.predict(PAIRS, show_progress_bar=False), atol=1e-5)


def test_a_saved_cross_encoder_is_known(results, tmp_path):
    """A folder that sentence-transformers saved is for pairs, with its prompt and its length."""
    library = pytest.importorskip("sentence_transformers")
    hf_folders.bert(tmp_path / "m", "BertForSequenceClassification", num_labels=1)
    settings = {"prompts": {"ask": "the dog "}, "default_prompt_name": "ask", "max_length": 16}
    encoder = library.CrossEncoder(str(tmp_path / "m"), device="cpu", **settings)
    encoder.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    found = results(tmp_path / "saved", "text", "other")["score"]
    np.testing.assert_allclose(found, encoder.predict(PAIRS, show_progress_bar=False), atol=1e-5)


def test_classes_of_images(run, work):
    """Images from a folder or as bytes in a column go through the folder's own processor."""
    image_module, table_module = (pytest.importorskip(name) for name in ("PIL.Image", "pyarrow.parquet"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    hf_folders.save_model(
        work / "m", "ViTForImageClassification", "ViTConfig", image_size=16, patch_size=8, **sizes, **LABELS
    )
    (work / "m" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}})
    )
    pixels = torch.randint(0, 256, (5, 30, 20, 3), generator=torch.Generator().manual_seed(0))
    images = [image_module.fromarray(each.numpy().astype(np.uint8)) for each in pixels]
    (work / "pictures").mkdir()
    rows = []
    for index, image in enumerate(images):
        image.save(work / "pictures" / f"{index}.png")
        image.save(buffer := io.BytesIO(), "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{index}.png"}})
    pyarrow = pytest.importorskip("pyarrow")
    table_module.write_table(pyarrow.Table.from_pylist(rows), work / "images.parquet")
    wanted = transformers.pipeline("image-classification", str(work / "m"), device="cpu", top_k=1)(images)
    for source, columns in (("pictures", ()), ("images.parquet", ("image",))):
        run(work / source, str(work / "m"), columns=columns, batch_size=2, output=work / f"{source}.out")
        check(hf_folders.columns(work / f"{source}.out"), [each[0] for each in wanted])


@pytest.mark.parametrize(
    ("architecture", "more", "choices"),
    [
        ("BertForSequenceClassification", {"id2label": {"0": "x"}}, "classify or rerank"),
        ("BertForMaskedLM", {}, "embed or classify or tokens or rerank or generate or caption"),
        (None, {}, "embed or classify"),
    ],
)
def test_a_folder_that_does_not_say(run, numbers, work, architecture, more, choices):
    """The error lists what there is to choose."""
    (work / "m").mkdir()
    config = {"architectures": [architecture] if architecture else None, **more}
    (work / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(JobUsageError, match=f"Give --task {choices}"):
        run(numbers(1), str(work / "m"))


def test_a_model_without_the_head_is_refused(run, numbers, work):
    """Weights are never drawn at random."""
    hf_folders.bert(work / "m")
    with pytest.raises(ModelLoadError, match=r"lacks weights .*: classifier"):
        run(numbers(1), str(work / "m"), task="classify")


def test_values_that_are_no_texts(run, work):
    """The error says which columns to choose."""
    hf_folders.bert(work / "m", "BertForSequenceClassification", num_labels=1)
    (work / "t.jsonl").write_text('{"a": "one", "b": 2}\n')
    for task, columns, wanted in [
        ("classify", ("b",), "expected text or a pair of texts, got 2"),
        ("rerank", ("a", "b"), "expected a pair of texts"),
        ("rerank", ("a",), "--column query --column text"),
    ]:
        from asyncdp.errors import RecordError

        with pytest.raises(RecordError, match=wanted):
            run(
                work / "t.jsonl",
                str(work / "m"),
                task=task,
                columns=columns,
                output=work / f"{task}{columns}",
            )
