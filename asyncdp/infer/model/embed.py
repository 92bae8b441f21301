"""Embeddings of texts, from the folder of an encoder or of sentence-transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import JobUsageError
from ..steps import Steps, same
from .folders import files_read, load_config, load_pretrained, load_tokenizer, max_length
from .packing import packed
from .pooling import Normalize, Pooling
from .quantize import Quantize, read_ranges
from .sentence_folder import SentenceFolder
from .task_options import TaskOptions
from .texts import PadTokens, Tokenize, num_tokens

_WITH_POOLER = ("bert", "roberta", "xlm-roberta")

# Models whose decoder would ask for a text of its own.
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
}


class Embedder(nn.Module):
    """A transformer encoder whose token states are pooled to one vector for each text.

    Args:
        encoder: called with token ids [batch, length] and a mask of the same shape, or None for a
            batch without padding; gives `last_hidden_state` [batch, length, width].
        pooling: called with these states and the mask.
        layers: what follows the pooling; vectors of length one if None.
        width: how many entries of a vector are kept, all if None.
    """

    def __init__(
        self,
        encoder: nn.Module,
        pooling: nn.Module | None = None,
        layers: nn.Module | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling or Pooling()
        self.layers = Normalize() if layers is None else layers
        self.width = width

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return `embedding` [batch, width]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
        embedding: torch.Tensor = self.layers(self.pooling(states, attention_mask))
        return {"embedding": embedding[:, : self.width]}


def load_embedder(
    folder: Path, options: TaskOptions | None = None, *, allow_pickle: bool = False
) -> tuple[Embedder, dict[str, Path]]:
    """Load the model of a folder, from safetensors only and without running code in it.

    Args:
        folder: of an encoder, or of sentence-transformers.
        options: what to make of it.
        allow_pickle: whether the layers behind the pooling may be pickles.

    Returns:
        The model, and the files of the folder that the vectors depend on, by what they are.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelLoadError: the folder is no complete encoder, or computes in another way.
        JobUsageError: an option does not fit the folder.
    """
    options = options or TaskOptions()
    settings = SentenceFolder.read(folder)
    settings.check_dense()
    encoder = _load_encoder(settings.encoder)
    modes = settings.pooling_modes
    layers, width = settings.load_layers(len(modes) * encoder.config.hidden_size, allow_pickle=allow_pickle)
    if options.truncate_dim is not None and options.truncate_dim > width:
        raise JobUsageError(
            f"--truncate-dim {options.truncate_dim} is beyond the vectors' {width} entries", "Give fewer."
        )
    width = min(options.truncate_dim or settings.settings.get("truncate_dim") or width, width)
    pooling = Pooling(modes, _num_skipped(settings, options))
    return Embedder(packed(encoder), pooling, layers, width), files_read(folder)


def embed_steps(folder: Path, options: TaskOptions | None = None, width: int | None = None) -> Steps:
    """Return the steps that turn texts into batches of tokens, and vectors into what is stored.

    Args:
        folder: of an encoder, or of sentence-transformers.
        options: what to make of it.
        width: entries of the vectors, where they are quantised.

    Raises:
        ModelLoadError: the folder has no tokenizer.
        JobUsageError: an option does not fit the folder.
    """
    options = options or TaskOptions()
    settings = SentenceFolder.read(folder)
    tokenize = _tokenize(settings, settings.find_prompt(options.prompt, options.prompt_name))
    steps = Steps(tokenize, PadTokens.of(tokenize.tokenizer), same, num_tokens)
    if options.precision in (None, "float32"):
        return steps
    assert width is not None, "the width is known where vectors are quantised"
    ranges = read_ranges(Path(options.calibration), width) if options.calibration else None
    return dataclasses.replace(steps, finish=Quantize(options.precision, ranges))


def load_embedding(folder: Path, options: TaskOptions, *, allow_pickle: bool) -> tuple[nn.Module, Steps]:
    """Load the model and the steps of `--task embed`; raises as `load_embedder` does."""
    embedder, _ = load_embedder(folder, options, allow_pickle=allow_pickle)
    return embedder, embed_steps(folder, options, embedder.width)


def _load_encoder(folder: Path) -> Any:
    config = load_config(folder)
    # The encoder's own pooler would be computed and thrown away.
    extra = {"add_pooling_layer": False} if config.model_type in _WITH_POOLER else {}
    return load_pretrained(folder, _ENCODERS.get(config.model_type, "AutoModel"), unused="pooler", **extra)


def _tokenize(settings: SentenceFolder, prompt: str) -> Tokenize:
    folder = settings.encoder
    tokenizer = load_tokenizer(folder)
    if settings.encoder_settings.get("do_lower_case"):
        _lower_case(tokenizer)
    limit = settings.max_seq_length or max_length(tokenizer, load_config(folder))
    # Which parts of a text are which matters to few models, and those take it.
    return Tokenize(tokenizer, limit, arguments=("input_ids", "token_type_ids"), prompt=prompt)


def _lower_case(tokenizer: Any) -> None:
    """Let a tokenizer lower its texts first."""
    from tokenizers import normalizers

    own = tokenizer.backend_tokenizer.normalizer
    lowered = [normalizers.Lowercase(), *([own] if own is not None else [])]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(lowered)


def _num_skipped(settings: SentenceFolder, options: TaskOptions) -> int:
    """Return how many tokens of a prompt stay out of the pooling."""
    prompt = settings.find_prompt(options.prompt, options.prompt_name)
    if not prompt or settings.pools_prompt:
        return 0
    tokenize = _tokenize(settings, "")
    (ids,) = tokenize([prompt])
    return len(ids) - (ids[-1] in tokenize.tokenizer.all_special_ids)
