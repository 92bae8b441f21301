"""Texts that language models write are those of transformers, whatever stands beside them in a batch."""

from __future__ import annotations

import json

import hf_folders
import numpy as np
import pytest
import torch
from hf_folders import TEXTS

from asyncdp.errors import JobUsageError, ModelLoadError, RecordError
from asyncdp.infer.model.sampling import Choice, draws_of

transformers = pytest.importorskip("transformers")

PROMPTS = ["the", "dogs and foxes", "Anna met Bob in Berlin", "a fox", "the quick brown fox", "dogs", "dogs"]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """A tiny language model that goes on with a text."""
    folder = tmp_path_factory.mktemp("gpt2")
    hf_folders.gpt2(folder)
    return folder


@pytest.fixture(scope="session")
def writer(tmp_path_factory):
    """A tiny T5."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = hf_folders.save_tokenizer(folder)
    settings = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    settings |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}
    hf_folders.save_model(
        folder, "T5ForConditionalGeneration", "T5Config", vocab_size=len(tokenizer), **settings
    )
    return folder


@pytest.fixture
def write(run, work):
    """Run a job over prompts; return its columns."""

    def write(folder, prompts=PROMPTS, *, lines=False, **options):
        (work / "t.jsonl").write_text("".join(json.dumps({"x": each}) + "\n" for each in prompts))
        options = {"batch_size": 4, "max_new_tokens": 12, **options}
        write.count += 1
        output = work / f"out{write.count}"
        write.summary = run(work / "t.jsonl", str(folder), output=output, **options)
        return hf_folders.columns(output)

    write.count = 0
    return write


def generated(folder, prompts=PROMPTS, **settings):
    """What transformers writes for each prompt alone."""
    kind = "AutoModelForSeq2SeqLM" if "t5" in str(folder) else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        (tokens,) = model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, **settings})
        before = 0 if "t5" in str(folder) else inputs["input_ids"].shape[1]
        texts.append(tokenizer.decode(tokens[before:], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_decoder_goes_on(write, decoder, batch_size):
    """The best tokens, from left-padded batches as from each prompt alone; tokens are counted."""
    found = write(decoder, batch_size=batch_size)
    assert found["text"] == generated(decoder)
    assert set(found["finish_reason"]) <= {"stop", "length"}
    assert write.summary.num_tokens == sum(found["num_tokens"]) > 0
    assert write.summary.token_rate > 0


def test_an_encoder_and_decoder_write(write, writer):
    """The folder decides for the task; texts of unlike length share a batch."""
    assert write(writer, TEXTS)["text"] == generated(writer, TEXTS)


def test_the_pipeline_gives_the_same(write, decoder):
    """Text, prompt left out, as transformers' own pipeline returns it."""
    pipeline = transformers.pipeline("text-generation", str(decoder), device="cpu")
    wanted = pipeline(PROMPTS, max_new_tokens=12, do_sample=False, return_full_text=False)
    assert write(decoder, task="generate")["text"] == [each[0]["generated_text"] for each in wanted]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_length": 9},
        {"num_beams": 3},
        {"suppress_tokens": [7, 9]},
    ],
    ids=str,
)
def test_settings_of_the_folder_count(write, decoder, tmp_path, settings):
    """What generation_config.json says is obeyed, and padding does not change what it finds."""
    folder = hf_folders.copy_with(decoder, tmp_path / "m", "generation_config.json", **settings)
    assert write(folder)["text"] == generated(folder)


def test_sampling_depends_on_seed_and_record_alone(write, decoder):
    """Lanes, batches and parts of a job do not matter; equal prompts at other places differ."""
    options = {"temperature": 1.2, "top_k": 40, "top_p": 0.95}
    one = write(decoder, seed=5, **options)
    assert one == write(decoder, seed=5, batch_size=1, devices="cpu", **options)
    assert one == write(decoder, seed=5, batch_size=7, window=2, **options)
    part = write(decoder, seed=5, shard_size=3, shard="2/3", **options)
    assert part["text"] == one["text"][3:6]
    assert one["text"] != write(decoder, seed=6, **options)["text"]
    assert one["text"][-1] != one["text"][-2]
    assert one["text"] != generated(decoder)


def test_sampling_draws_what_is_probable():
    """Tokens come as often as their probability says, and those that were ruled out never."""
    scores = torch.tensor([[0.5, 0.2, 0.0, 0.3]]).log().repeat(4000, 1)
    choice = Choice([], draws_of(range(4000), 1, seed=1))
    found = choice(torch.zeros(4000, 5), scores).argmax(1).bincount(minlength=4) / 4000
    np.testing.assert_allclose(found, [0.5, 0.2, 0.0, 0.3], atol=0.03)


def test_a_folder_that_samples(write, decoder, tmp_path):
    """Sampling that the folder asks for is done, and a temperature of 0 takes the best tokens."""
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 30}
    folder = hf_folders.copy_with(decoder, tmp_path / "m", "generation_config.json", **settings)
    assert write(folder)["text"] == write(decoder, temperature=1.5, top_k=30)["text"]
    assert write(folder, temperature=0.0)["text"] == generated(decoder)


@pytest.mark.parametrize("name", ["decoder", "writer"])
def test_stop_texts(write, request, name):
    """A text ends before the first of them."""
    folder = request.getfixturevalue(name)
    plain = generated(folder)
    stop = next(word for text in plain for word in text.split()[2:3])
    found = write(folder, stop=(stop, "never there"))
    assert found["text"] == [text.split(stop)[0] for text in plain]
    stopped = [number for number, text in zip(found["num_tokens"], plain, strict=True) if stop in text]
    assert min(stopped) < 12
    assert {found["finish_reason"][index] for index, text in enumerate(plain) if stop in text} == {"stop"}


def test_a_static_cache_gives_the_same(write, decoder):
    """Where keys and values lie changes no text."""
    assert write(decoder, cache="static")["text"] == generated(decoder)


def test_chat(write, decoder, tmp_path):
    """Messages go through the folder's chat template; a prompt stands before plain texts."""
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}fox{% endif %}"
    folder = hf_folders.copy_with(decoder, tmp_path / "m", "tokenizer_config.json", chat_template=template)
    found = write(folder, [[{"role": "dogs", "content": "jump over"}]])
    assert found["text"] == generated(decoder, ["dogs jump over fox"])
    assert write(decoder, ["jump over"], prompt="dogs ")["text"] == generated(decoder, ["dogs jump over"])


def test_captions(run, work):
    """Images go through the folder's processor, and the model writes about each."""
    image_module = pytest.importorskip("PIL.Image")
    folder = work / "m"
    tokenizer = hf_folders.save_tokenizer(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    text = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=40, vocab_size=len(tokenizer), add_cross_attention=True
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    model = transformers.VisionEncoderDecoderModel(config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}})
    )
    (work / "pictures").mkdir()
    pixels = torch.randint(0, 256, (5, 20, 30, 3), generator=torch.Generator().manual_seed(0))
    images = [image_module.fromarray(each.numpy().astype(np.uint8)) for each in pixels]
    for index, image in enumerate(images):
        image.save(work / "pictures" / f"{index}.png")
    run(work / "pictures", str(folder), columns=(), batch_size=2, max_new_tokens=8)
    model = transformers.VisionEncoderDecoderModel.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    wanted = transformers.AutoTokenizer.from_pretrained(folder).batch_decode(tokens, skip_special_tokens=True)
    assert hf_folders.columns(work / "out")["text"] == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "--compile has no effect with --task generate"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"stop": ("",)}, "--stop is an empty text"),
        ({"truncate_dim": 5}, "--truncate-dim has no effect with --task generate"),
        ({"cache": "huge"}, "Choose one of dynamic, static"),
    ],
)
def test_options_that_do_not_fit(write, decoder, options, message, monkeypatch):
    """They are told before any record is run."""
    monkeypatch.setattr("asyncdp.infer.model.models._check_compiler", lambda: None)
    with pytest.raises(JobUsageError, match=message):
        write(decoder, **options)


def test_beams_are_not_sampled(write, decoder, tmp_path):
    """A folder of beams says what to change."""
    settings = {"num_beams": 2, "do_sample": True}
    folder = hf_folders.copy_with(decoder, tmp_path / "m", "generation_config.json", **settings)
    with pytest.raises(ModelLoadError, match="beams are not sampled"):
        write(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dogs " * 60, r"60 tokens, and with 12 new ones that is more than the 64"),
        ("", "no tokens to go on from"),
        (3, "expected text or chat messages, got 3"),
    ],
)
def test_prompts_that_are_refused(write, decoder, value, message):
    """A prompt is never cut: the record is bad."""
    with pytest.raises(RecordError, match=message):
        write(decoder, [value])
