"""Which folders of Hugging Face are embedded as they are meant to be, and what of them a job depends on."""

from __future__ import annotations

import json
import shutil

import pytest

from asyncdp.errors import ModelLoadError, ResumeRefusedError

EMBED = {"task": "embed", "columns": ()}
TRANSFORMER, POOLING, NORMALIZE = (
    {"path": path, "type": f"sentence_transformers.models.{kind}"}
    for path, kind in [("", "Transformer"), ("pool", "Pooling"), ("2_Normalize", "Normalize")]
)


@pytest.fixture
def folder(work, encoder_folder):
    """A copy of the tiny encoder, as sentence-transformers saves one that pools by the mean."""
    (work / "t.txt").write_text("one two\nthree\n")
    copy = work / "model"
    shutil.copytree(encoder_folder, copy)
    (copy / "pool").mkdir()
    (copy / "pool" / "config.json").write_text('{"pooling_mode": "mean"}')
    (copy / "modules.json").write_text(json.dumps([TRANSFORMER, POOLING, NORMALIZE]))
    return copy


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode": "mean"},
        {"pooling_mode": ["mean"]},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
        {"pooling_mode": "mean", "pooling_mode_cls_token": True},  # the newer key counts
    ],
)
def test_pooling_by_the_mean_is_embedded(run, work, folder, config):
    """Both ways to write down the mean are understood."""
    (folder / "pool" / "config.json").write_text(json.dumps(config))
    assert run(work / "t.txt", str(folder), **EMBED).num_records == 2


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"pooling_mode": "median"}, "median"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_other": True}, "pooling_mode_other"),
        ({"pooling_mode_mean_tokens": False}, "none of 1 modes"),
    ],
)
def test_unknown_pooling_is_refused(run, work, folder, config, found):
    """A model that pools otherwise is never averaged silently, however its folder says so."""
    (folder / "pool" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=rf"pools by {found}"):
        run(work / "t.txt", str(folder), **EMBED)
    assert not (work / "out").exists()


MODULES = "sentence_transformers.models."


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ([TRANSFORMER, POOLING, {"path": "2", "type": MODULES + "CNN"}], "a module CNN, which"),
        ([TRANSFORMER, {"path": "1", "type": MODULES + "LSTM"}, POOLING], "a module LSTM, where"),
        ([{"path": "", "type": MODULES + "MLMTransformer"}, POOLING], r"is sparse \(SPLADE\)"),
        ([TRANSFORMER, {"path": "1", "type": MODULES + "SpladePooling"}], r"is sparse \(SPLADE\)"),
        ([TRANSFORMER], "has no pooling"),
        ([{"path": "", "type": "own_code.Transformer"}, POOLING], "with code of its own"),
        ([TRANSFORMER, {"path": "../pool", "type": MODULES + "Pooling"}], "outside of the folder"),
    ],
)
def test_other_modules_are_refused(run, work, folder, modules, found):
    """What would be left out, and code, are named."""
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelLoadError, match=found):
        run(work / "t.txt", str(folder), **EMBED)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("modules.json", '[{"path": '),
        ("modules.json", "[1]"),
        ("pool/config.json", "[]"),
        ("sentence_bert_config.json", '{"max_seq'),
    ],
)
def test_damaged_settings_are_reported(run, work, folder, name, text):
    """Settings of the embedding that cannot be read are an error, never guessed."""
    (folder / name).write_text(text)
    with pytest.raises(ModelLoadError, match=rf"{name} cannot be read"):
        run(work / "t.txt", str(folder), **EMBED)


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "spiece.model", "pool/config.json"])
def test_a_changed_file_of_the_tokenizer_or_the_pooling_is_another_job(run, work, folder, name):
    """All that transformers may read from the folder is part of the fingerprint."""
    if not (folder / name).exists():
        (folder / name).write_text("[UNK]\none\n")
    run(work / "t.txt", str(folder), **EMBED)
    (folder / name).write_text((folder / name).read_text() + "\n")
    with pytest.raises(ResumeRefusedError, match=rf"model file {name} was"):
        run(work / "t.txt", str(folder), resume=True, **EMBED)


def test_files_that_are_not_read_do_not_matter(run, work, folder):
    """Notes, hidden files and weights of other libraries may come and go; the folder may move."""
    run(work / "t.txt", str(folder), **EMBED)
    for name in ("README.md", ".gitattributes", "tf_model.h5", "pytorch_model.bin"):
        (folder / name).write_text("x")
    moved = folder.rename(work / "elsewhere")
    assert run(work / "t.txt", str(moved), resume=True, **EMBED).num_earlier == 2
