"""Models from files: exported programs, pickles, Hugging Face folders."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import threading
import warnings
import zipfile

import numpy as np
import pyarrow.dataset
import pytest
import safetensors.torch
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from asyncdp.errors import JobError, JobUsageError, ModelLoadError
from asyncdp.infer.model.embed import embed_steps
from asyncdp.infer.model.exported import load_exported
from asyncdp.infer.model.weights import load_weights


class Evil:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.fixture
def exported(work):
    """An exported linear model with a free batch dimension."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, (torch.zeros(4, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, work / "model.pt2")
    return work / "model.pt2", model


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_program(run, work, numbers, exported):
    """A .pt2 file runs over lanes as the module it was made from."""
    path, model = exported
    run(numbers(5), str(path))
    table = pyarrow.dataset.dataset(work / "out", format="parquet").to_table()
    expected = model(torch.tensor([[float(i), 1, 0] for i in range(5)])).detach().numpy()
    np.testing.assert_allclose(np.stack(table["output"].to_pylist()), expected, rtol=1e-5)


def rewritten(path, change):
    """Copy an archive; `change` may alter names and contents, or add members."""
    target = path.with_name("crafted.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as crafted:
        for name in source.namelist():
            for new_name, data in change(name, source.read(name)):
                crafted.writestr(new_name, data)
    return target


def test_crafted_exported_program_with_a_pickled_weight(work, exported):
    """A .pt2 whose weights are marked as pickles is refused before anything is unpickled."""

    def change(name, data):
        if name.endswith("weights_config.json"):
            data = data.replace(b'"use_pickle": false', b'"use_pickle":true')
        yield name, pickle.dumps(Evil()) if "/weights/weight_" in name else data

    with pytest.raises(ModelLoadError, match="would load a pickle"):
        load_exported(rewritten(exported[0], change), allow_pickle=False)
    assert not (work / "pwned").exists()


@pytest.mark.parametrize("member", ["constants/custom_obj_0", "weights/model.pt", "aotinductor/model/m.so"])
def test_crafted_exported_program_with_other_members(work, exported, member):
    """A .pt2 that carries objects, old pickles or native code is refused by name."""

    def change(name, data):
        yield name, data
        if name.endswith("archive_format"):
            yield f"{name.partition('/')[0]}/data/{member}", pickle.dumps(Evil())

    with pytest.raises(ModelLoadError, match="pickle or native code"):
        load_exported(rewritten(exported[0], change), allow_pickle=False)
    assert not (work / "pwned").exists()


def test_crafted_example_inputs(work, exported):
    """Example inputs that are a pickle with code in it are never run, whatever torch falls back to."""

    def change(name, data):
        yield name, pickle.dumps(Evil()) if "/sample_inputs/" in name else data

    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_exported(rewritten(exported[0], change), allow_pickle=False)
    assert not (work / "pwned").exists()


def test_half_written_exported_program(exported):
    """A .pt2 that lost its end says that it cannot be loaded."""
    path, _ = exported
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ModelLoadError, match=r"model.pt2 cannot be loaded"):
        load_exported(path, allow_pickle=False)


def test_pickled_weights_need_the_flag_and_stay_weights_only(work):
    """A .pt is refused by default; with the flag weights load, but code in it still does not run."""
    model = nn.Linear(3, 2)
    torch.save(model.state_dict(), work / "w.pt")
    torch.save({"weight": Evil()}, work / "evil.pt")
    with pytest.raises(ModelLoadError, match="a pickle can run any code"):
        load_weights(nn.Linear(3, 2), work / "w.pt", allow_pickle=False)
    other = nn.Linear(3, 2)
    load_weights(other, work / "w.pt", allow_pickle=True)
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_weights(nn.Linear(3, 2), work / "evil.pt", allow_pickle=True)
    assert not (work / "pwned").exists()


def test_compile_runs_the_compiled_model_on_every_lane(run, work, numbers, monkeypatch):
    """Each lane compiles its own replica once, in its own thread, and runs the result."""
    both, compiled = threading.Barrier(2, timeout=20), []

    def stand_in(call, **options):
        compiled.append((threading.current_thread().name, options))
        both.wait()  # neither lane goes on before the other one has a task too
        return lambda *args, **kwargs: {"total": call(*args, **kwargs)["total"] + 1000}

    monkeypatch.setattr(torch, "compile", stand_in)
    run(numbers(60), compile=True, batch_size=4)
    table = pyarrow.dataset.dataset(work / "out", format="parquet").to_table()
    assert table["total"].to_pylist() == [index + 1001.0 for index in range(60)]
    assert len({thread for thread, _ in compiled}) == len(compiled) == 2
    assert [options for _, options in compiled] == [{"dynamic": True}] * 2


def test_two_lanes_may_compile_at_once(run, work, numbers, monkeypatch):
    """torch.compile itself, without its code generator, takes models in inference mode from both lanes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run(numbers(60), "models_for_tests:linear", compile=True, batch_size=4)
    run(numbers(60), "models_for_tests:linear", output=work / "plain", batch_size=4)
    first, second = (
        np.stack(pyarrow.dataset.dataset(work / name, format="parquet").to_table()["output"].to_pylist())
        for name in ("out", "plain")
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_a_model_that_does_not_compile_fails_the_job(run, numbers, monkeypatch):
    """It is no record's fault, so nothing is skipped, and no batch is halved to compile again."""
    attempts = []

    def fail(*args, **kwargs):
        attempts.append(args)
        raise TorchDynamoException("cannot generate code")

    monkeypatch.setattr(torch, "compile", lambda call, **options: fail)
    with pytest.raises(JobError, match=r"--compile failed with TorchDynamoException: cannot generate"):
        run(numbers(20), compile=True, on_error="skip", devices="cpu")
    assert len(attempts) <= 2  # two batches per lane are under way


def test_a_missing_compiler_is_reported_before_the_job(run, work, numbers, monkeypatch):
    """Without a C++ compiler torch.compile cannot make code for the CPU; the remedy is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(JobUsageError, match=r"no /nowhere/g\+\+. Install one, .*leave --compile out"):
        run(numbers(1), compile=True)
    assert not (work / "out").exists()


TEXTS = ["one", "one two three four", "three", "two two", "one two three four one two"]


def test_embeddings_do_not_depend_on_the_batch(run, work, encoder_folder):
    """Padding does not leak: a text's vector is the same alone and among longer ones, with length one."""
    (work / "t.txt").write_text("\n".join(TEXTS) + "\n")
    embed = {"task": "embed", "columns": ()}
    run(work / "t.txt", str(encoder_folder), **embed)
    run(work / "t.txt", str(encoder_folder), batch_size=1, output=work / "single", **embed)
    together, alone = (
        np.stack(pyarrow.dataset.dataset(work / name, format="parquet").to_table()["embedding"].to_pylist())
        for name in ("out", "single")
    )
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-5)


def test_a_tokenizer_is_set_up_before_threads_share_it(encoder_folder):
    """No call changes its settings, which would fail while another thread tokenizes."""
    tokenize = embed_steps(encoder_folder).preprocess
    before = tokenize.tokenizer.backend_tokenizer.truncation
    assert before is not None
    tokenize(["some words"])
    assert tokenize.tokenizer.backend_tokenizer.truncation == before


def test_texts_are_asked_for(run, work, encoder_folder):
    """A record that is no text says how to choose one."""
    from asyncdp.errors import RecordError

    (work / "t.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    with pytest.raises(RecordError, match=r"Record 0 .*choose the text with --column"):
        run(work / "t.jsonl", str(encoder_folder), task="embed", columns=())


def test_folders_that_are_no_encoder(run, work, numbers, encoder_folder):
    """Missing weights, pickled weights only, and another pooling are distinguished."""
    broken = work / "broken"
    shutil.copytree(encoder_folder, broken)
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(tensors, broken / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="no model that transformers can load"):
        run(numbers(1), str(broken), task="embed")
    (broken / "1_Pooling").mkdir()
    (broken / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')
    with pytest.raises(ModelLoadError, match="pools by none of 1 modes"):
        run(numbers(1), str(broken), task="embed")
