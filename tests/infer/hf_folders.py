"""Tiny Hugging Face folders of random weights, and the texts that their tokenizers know."""

from __future__ import annotations

import importlib
import json
import shutil

import torch

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "A fox!",
    "  Anna met Bob in Berlin, and they talked about foxes and dogs for a very long time.  ",
    "dogs",
    "Bob paid 20 euros for the brown dog",
    "the the the",
    "Unseen wörds £ here: quixotic zebras",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_tokenizer(folder, **settings):
    """A WordPiece tokenizer with the marks of BERT."""
    tokenizers, transformers = (importlib.import_module(name) for name in ("tokenizers", "transformers"))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:6], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=24,
        **{f"{name}_token": token for name, token in names.items()},
        **settings,
    )
    fast.save_pretrained(folder)
    return fast


def save_model(folder, name, config_name, **settings):
    """A model of transformers whose weights are random but lively."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**settings)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def bert(folder, name="BertModel", **settings):
    """A tiny BERT with a tokenizer."""
    tokenizer = save_tokenizer(folder)
    settings = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 40, **settings}
    return save_model(folder, name, "BertConfig", **settings)


def gpt2(folder):
    """A tiny GPT2, whose tokenizer leaves the marks of BERT away."""
    tokenizer = save_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    settings |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return save_model(folder, "GPT2LMHeadModel", "GPT2Config", **settings)


def columns(folder):
    """The columns of a job's Parquet output."""
    dataset = importlib.import_module("pyarrow.dataset")
    return dataset.dataset(folder, format="parquet").to_table().to_pydict()


def copy_with(folder, target, name, **settings):
    """A copy of a folder whose JSON file `name` has further settings."""
    shutil.copytree(folder, target)
    loaded = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps({**loaded, **settings}))
    return target


def whisper(folder):
    """A tiny Whisper whose window is two seconds."""
    transformers = importlib.import_module("transformers")
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    marks += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    convert = importlib.import_module("transformers.convert_slow_tokenizer").bytes_to_unicode
    words = {letter: number for number, letter in enumerate(convert().values())}
    times = [f"<|{number / 50:.2f}|>" for number in range(101)]
    words |= {mark: len(words) + number for number, mark in enumerate([*marks, *times])}
    tokenizer = transformers.WhisperTokenizer(vocab=words, merges=[], language="en", task="transcribe")
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=2).save_pretrained(folder)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_target_positions": 32}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 100}
    end, start = words["<|endoftext|>"], words["<|startoftranscript|>"]
    ends = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    model = save_model(
        folder, "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=len(words), **sizes, **ends
    )
    settings = {
        **ends,
        "max_length": 12,
        "is_multilingual": True,
        "lang_to_id": {mark: words[mark] for mark in ("<|en|>", "<|de|>")},
        "task_to_id": {mark: words[f"<|{mark}|>"] for mark in ("translate", "transcribe")},
        "no_timestamps_token_id": words["<|notimestamps|>"],
        "prev_sot_token_id": words["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "alignment_heads": [[0, 0], [0, 1]],
        # The earliest times too: each turn over a long sound goes on by half a second at least.
        "suppress_tokens": [words[mark] for mark in (*marks[1:-1], *times[:25])],
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return model


def wav2vec2(folder):
    """A tiny Wav2Vec2 with a head of CTC over letters."""
    transformers = importlib.import_module("transformers")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefgh"]
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"conv_dim": [8, 8, 8], "conv_kernel": [10, 4, 4], "conv_stride": [10, 8, 4]}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(vocab_size=len(letters), **sizes)).eval()
    for parameter in (*model.lm_head.parameters(), *model.wav2vec2.feature_extractor.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model


def moonshine(folder):
    """A tiny Moonshine: an encoder of samples and a decoder of text."""
    transformers = importlib.import_module("transformers")
    tokenizer = save_tokenizer(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "encoder_num_hidden_layers": 1}
    sizes |= {"decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 2}
    sizes |= {"decoder_num_attention_heads": 2, "decoder_start_token_id": 2, "eos_token_id": 3}
    sizes |= {"bos_token_id": 2, "pad_token_id": 0, "vocab_size": len(tokenizer)}
    return save_model(folder, "MoonshineForConditionalGeneration", "MoonshineConfig", **sizes)
