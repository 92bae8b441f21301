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
