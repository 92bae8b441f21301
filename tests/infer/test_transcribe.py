"""What is said in sounds is what transformers' pipeline of speech recognition makes of them."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import tarfile

import hf_folders
import numpy as np
import pytest
import torch

from asyncdp.errors import JobUsageError, ModelLoadError, RecordError
from asyncdp.infer.model.waveforms import Hear
from asyncdp.infer.readers import decode_audio

transformers = pytest.importorskip("transformers")
soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")

RATE = 16_000


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A tiny Whisper of several languages that hears two seconds at once."""
    folder = tmp_path_factory.mktemp("whisper")
    hf_folders.whisper(folder)
    return folder


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    """A tiny Wav2Vec2 with a head of CTC."""
    folder = tmp_path_factory.mktemp("wav2vec2")
    hf_folders.wav2vec2(folder)
    return folder


def sound(seconds, seed=0, rate=RATE):
    """Random tones, as 16-bit integers."""
    random = np.random.default_rng(seed)
    times = np.arange(int(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * random.uniform(100, 3000) * times) for _ in range(4))
    return (4000 * tones * np.sign(np.sin(2 * np.pi * times * 3))).astype(np.int16)


SOUNDS = [sound(seconds, seed) for seed, seconds in enumerate([0.7, 1.5, 0.7, 2.6])]


@pytest.fixture
def folder_of_sounds(work):
    """Sounds as files of several formats without loss."""
    (work / "sounds").mkdir()
    for index, samples in enumerate(SOUNDS):
        soundfile.write(work / "sounds" / f"{index}.{('wav', 'flac', 'aiff')[index % 3]}", samples, RATE)
    return work / "sounds"


@pytest.fixture
def transcribe(run, work):
    """Run a job over files; return its columns."""

    def transcribe(inputs, folder, **options):
        transcribe.count += 1
        output = work / f"out{transcribe.count}"
        options = {"columns": (), "batch_size": 4, **options}
        transcribe.summary = run(inputs, str(folder), output=output, **options)
        return hf_folders.columns(output)

    transcribe.count = 0
    return transcribe


def heard(folder, sounds=SOUNDS, **settings):
    """What the pipeline makes of each sound alone."""
    pipeline = transformers.pipeline("automatic-speech-recognition", str(folder), device="cpu")
    inputs = [{"raw": each.astype(np.float32) / 32768, "sampling_rate": RATE} for each in sounds]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take most of the time of tiny models
    try:
        return [pipeline(each, **settings) for each in inputs]
    finally:
        torch.set_num_threads(num_threads)


def plain(chunks):
    """Chunks with lists, as Parquet has them, in the place of tuples."""
    return [[{**each, "timestamp": list(each["timestamp"])} for each in some] for some in chunks]


@pytest.mark.filterwarnings("ignore:std..:UserWarning")  # of transformers, behind the end of a sound
@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("whisper", {}, {}),
        ("whisper", {"timestamps": "segments", "num_beams": 1, "batch_size": 1}, {"return_timestamps": True}),
        ("whisper", {"timestamps": "words", "num_beams": 1}, {"return_timestamps": "word"}),
        ("whisper", {"language": "German", "num_beams": 1, "max_new_tokens": 7}, {"language": "de"}),
        ("whisper", {"chunk_seconds": 1.2, "num_beams": 1}, {"chunk_length_s": 1.2}),
        ("ctc", {}, {}),
        ("ctc", {"timestamps": "words"}, {"return_timestamps": "word"}),
        ("ctc", {"timestamps": "chars"}, {"return_timestamps": "char"}),
        ("ctc", {"chunk_seconds": 1.2}, {"chunk_length_s": 1.2}),
    ],
    ids=str,
)
def test_a_folder_of_sounds(transcribe, request, folder_of_sounds, name, options, settings):
    """Texts and times are those of the pipeline, short and long sounds in one batch."""
    folder = request.getfixturevalue(name)
    found = transcribe(folder_of_sounds, folder, **options)
    settings |= {name: options[name] for name in ("num_beams", "max_new_tokens") if name in options}
    wanted = heard(folder, **settings)
    assert found["text"] == [each["text"] for each in wanted]
    assert len(set(found["text"])) > 1
    if "timestamps" in options:
        assert found["chunks"] == plain(each["chunks"] for each in wanted)


def test_an_encoder_and_decoder_of_another_kind(transcribe, folder_of_sounds, tmp_path):
    """What is no Whisper generates too, from sounds of unlike length; there are no times."""
    folder = tmp_path / "moonshine"
    hf_folders.moonshine(folder)
    found = transcribe(folder_of_sounds, folder, num_beams=2, max_new_tokens=6)
    assert found["text"] == [each["text"] for each in heard(folder, num_beams=2, max_new_tokens=6)]
    with pytest.raises(JobUsageError, match="This model knows no --timestamps words"):
        transcribe(folder_of_sounds, folder, timestamps="words")


def encoded(samples, rate=RATE, **settings):
    """The bytes of a sound file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "FLAC", **settings})
    return file.getvalue()


def test_where_sounds_may_be(transcribe, work, ctc):
    """In tar files, and in columns as datasets stores them."""
    wanted = [each["text"] for each in heard(ctc)]
    with tarfile.open(work / "sounds.tar", "w") as archive:
        for index, samples in enumerate(SOUNDS):
            member = tarfile.TarInfo(f"{index}.flac")
            data = encoded(samples)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert transcribe(work / "sounds.tar", ctc, columns=("flac",))["text"] == wanted
    parquet, pyarrow = (importlib.import_module(name) for name in ("pyarrow.parquet", "pyarrow"))
    rows = [{"bytes": encoded(samples), "path": None} for samples in SOUNDS]
    parquet.write_table(pyarrow.table({"audio": rows}), work / "sounds.parquet")
    assert transcribe(work / "sounds.parquet", ctc, columns=("audio",))["text"] == wanted
    numbers = [{"array": (each / 32768).tolist(), "sampling_rate": RATE} for each in SOUNDS[:1]]
    (work / "sounds.jsonl").write_text("".join(json.dumps(each) + "\n" for each in numbers))
    assert transcribe(work / "sounds.jsonl", ctc)["text"] == wanted[:1]


def test_channels_and_rates(work, ctc):
    """Channels become their mean, and another rate is resampled: a tone stays the same tone."""
    times = np.arange(44_100) / 44_100
    tone = 0.25 * np.sin(2 * np.pi * 440 * times)
    stereo = np.stack([1.5 * tone, 0.5 * tone], axis=1)
    soundfile.write(work / "tone.wav", stereo, 44_100, subtype="FLOAT")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(ctc, do_normalize=False)
    hear = pickle.loads(pickle.dumps(Hear(extractor, None, 1)))  # as for a worker process
    (piece,) = hear([decode_audio(work / "tone.wav")])[0]
    heard_tone = piece["input_values"][0].numpy()
    wanted = 0.25 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(heard_tone[500:-500], wanted[500:-500], atol=1e-4)


def cut(kind, share, **settings):
    """The first part of a sound file."""
    data = encoded(SOUNDS[1], format=kind, **settings)
    return data[: int(len(data) * share)]


# Named, since some formats hold the time of their making, and a test has the same name in every process.
@pytest.mark.parametrize(
    ("data", "message"),
    [
        *(
            pytest.param(cut(format, share), "", id=f"{share:.0%} of {format}")
            for format in ("WAV", "AIFF", "FLAC", "MP3", "OGG")
            for share in (0.6, 0.99)
        ),
        pytest.param(cut("OGG", 0.99, subtype="OPUS"), "damaged or cut short", id="99% of Opus"),
        pytest.param(b"no sound", "cannot be decoded", id="text"),
        pytest.param(encoded(SOUNDS[1][:0], format="WAV"), "no samples", id="empty"),
        pytest.param(
            encoded(np.array([0.1, np.nan]), format="WAV", subtype="FLOAT"), "NaN or infinite", id="NaN"
        ),
    ],
)
def test_damaged_sounds_are_refused(data, message):
    """What is cut short is never taken for a shorter sound, in no format that states its end."""
    with pytest.raises(ValueError, match=message or "cut short|cannot be decoded"):
        decode_audio(io.BytesIO(data))


def test_sizes_that_are_not_known_are_no_damage():
    """A WAV file that was written into a pipe states the largest size there is."""
    data = bytearray(encoded(SOUNDS[0], format="WAV"))
    data[4:8] = data[40:44] = b"\xff" * 4
    assert len(decode_audio(io.BytesIO(bytes(data)))["array"]) == len(SOUNDS[0])


def test_bad_sounds_are_bad_records(transcribe, work, folder_of_sounds, ctc):
    """The others of the batch are heard, and a record says why it was not."""
    (folder_of_sounds / "4.wav").write_bytes(cut("WAV", 0.5))
    (folder_of_sounds / "5.mp3").write_text("no sound")
    found = transcribe(folder_of_sounds, ctc, on_error="record")
    assert found["text"] == [each["text"] for each in heard(ctc)]
    assert transcribe.summary.num_bad == 2
    (work / "t.jsonl").write_text('{"x": "text"}\n')
    with pytest.raises(RecordError, match="expected a sound file or its bytes, got 'text'"):
        transcribe(work / "t.jsonl", ctc, columns=("x",))


def test_sounds_for_a_model_of_ones_own(run, work, folder_of_sounds):
    """Without a task a record is the samples and their rate."""
    run(folder_of_sounds, columns=(), preprocess="models_for_tests:loudness", output_format="jsonl")
    rows = [json.loads(line) for line in (work / "out" / "part-000000.jsonl").read_text().splitlines()]
    wanted = [RATE + len(samples) + np.abs(samples / 32768).max() for samples in SOUNDS]
    np.testing.assert_allclose([row["total"] for row in rows], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("whisper", {"language": "Klingon"}, JobUsageError, "It knows en, de"),
        ("whisper", {"chunk_seconds": 2.5}, JobUsageError, "hears 2 seconds at once"),
        ("whisper", {"chunk_seconds": 0.0}, JobUsageError, "Give a number above 0"),
        ("whisper", {"timestamps": "chars"}, JobUsageError, "Give segments or words"),
        (
            "whisper",
            {"temperature": 0.5},
            JobUsageError,
            "--temperature has no effect with",
        ),
        ("ctc", {"language": "de"}, JobUsageError, "has no effect"),
        ("ctc", {"num_beams": 3}, JobUsageError, "has no effect"),
        ("ctc", {"task": "caption"}, ModelLoadError, "holds no model"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(transcribe, request, folder_of_sounds, name, options, error, message):
    """They are told before any record is run."""
    with pytest.raises(error, match=message):
        transcribe(folder_of_sounds, request.getfixturevalue(name), **options)
