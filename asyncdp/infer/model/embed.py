"""Sentence embeddings from a Hugging Face folder on disk: tokens, mean pooling, unit length."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import MissingExtraError, ModelLoadError
from ..steps import Steps, same
from .names import brief
from .packing import Packing, find_packing

_DEFAULT_MAX_LENGTH = 512
_WITH_POOLER = ("bert", "roberta", "xlm-roberta")
_MODULES = ("Transformer", "Pooling", "Normalize")

# What transformers leaves unread here: texts for people, code, and weights other than safetensors.
_UNREAD = frozenset({".md", ".py", ".bin", ".h5", ".msgpack", ".onnx", ".ot", ".gguf"})


class Embedder(nn.Module):
    """A transformer encoder whose token states are averaged and scaled to unit length.

    Args:
        encoder: called with token ids [batch, length] and a mask of the same shape, or None for a
            batch without padding; gives `last_hidden_state` [batch, length, width].
        packing: how the encoder runs on the CPU over tokens alone, where it can.
    """

    def __init__(self, encoder: nn.Module, packing: Packing | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self._packing = packing

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `embedding` [batch, width]."""
        return {"embedding": nn.functional.normalize(self._pooled(input_ids, attention_mask), dim=-1)}

    def _pooled(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        # A GPU would be given many small kernels; a compiler wants one shape whatever the lengths are.
        if (
            self._packing is not None
            and attention_mask is not None
            and input_ids.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            return self._packing.mean_states(self.encoder, input_ids, attention_mask)
        states: torch.Tensor = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        if attention_mask is None:
            return states.mean(1)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def load_embedder(folder: Path) -> tuple[Embedder, dict[str, Path]]:
    """Load the encoder of a folder, from safetensors only and without running code in it.

    Returns:
        The encoder, and the files of the folder that the vectors depend on, by what they are.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelLoadError: the folder is no complete encoder, or pools in another way.
    """
    transformers = _transformers()
    _check_modules(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        # BERT's own pooler would be computed and thrown away.
        extra = {"add_pooling_layer": False} if config.model_type in _WITH_POOLER else {}
        encoder = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **extra
        )
    except Exception as error:
        raise ModelLoadError(
            f"The folder {folder} holds no model that transformers can load: {brief(error)}",
            "It needs config.json and model.safetensors as save_pretrained writes them.",
        ) from error
    return Embedder(encoder, find_packing(encoder)), _files_read(folder)


def _files_read(folder: Path) -> dict[str, Path]:
    paths = [*folder.iterdir(), *folder.glob("*/config.json")]
    names = {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path.is_file()}
    return {
        f"model file {name}": path
        for name, path in names.items()
        if not name.startswith(".") and path.suffix.lower() not in _UNREAD
    }


def embed_steps(folder: Path) -> Steps:
    """Return the steps that turn texts into batches of tokens."""
    tokenizer = load_tokenizer(folder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Steps(Tokenize(tokenizer, max_length(folder, tokenizer)), PadTokens(pad), same, len)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder.

    Raises:
        ModelLoadError: the folder has none.
    """
    try:
        return _transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelLoadError(
            f"The folder {folder} holds no tokenizer: {brief(error)}",
            "Copy tokenizer.json and tokenizer_config.json of the model into it.",
        ) from error


def max_length(folder: Path, tokenizer: Any) -> int:
    """Return the number of tokens that a text is cut to."""
    limit = _json(folder / "sentence_bert_config.json", dict).get("max_seq_length")
    return int(limit or min(tokenizer.model_max_length, _DEFAULT_MAX_LENGTH))


class Tokenize:
    """Texts -> lists of token ids, cut to `max_length`."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        # The first call changes the tokenizer's settings, which fails while another thread uses it.
        self([""])

    def __call__(self, values: Sequence[Any]) -> list[list[int]]:
        """Tokenize all texts at once."""
        for value in values:
            if not isinstance(value, str):
                raise TypeError(f"expected text, got {value!r:.80}; choose the text with --column")
        encoded = self._tokenizer(
            list(values), truncation=True, max_length=self._max_length, return_attention_mask=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


class PadTokens:
    """Lists of token ids -> keyword arguments of `Embedder`."""

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, items: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Pad to the longest; a batch of one length needs no mask and runs faster without."""
        longest = max(map(len, items))
        ids = torch.tensor([item + [self._pad] * (longest - len(item)) for item in items])
        lengths = torch.tensor([len(item) for item in items])
        if bool((lengths == longest).all()):
            return {"input_ids": ids}
        return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).long()}


def _check_modules(folder: Path) -> None:
    """Fail where sentence-transformers would do more, or other things, than `Embedder` does."""
    modules = _modules(folder)
    for kind, _ in modules:
        if kind not in _MODULES:
            raise _unlike(folder, f"has a module {kind}, which --task embed does not run")
    for name in [path for kind, path in modules if kind == "Pooling"] or ["1_Pooling"]:
        modes = _pooling_modes(_json(folder / name / "config.json", dict))
        if modes not in ([], ["mean"], ["pooling_mode_mean_tokens"]):
            raise _unlike(folder, f"does not pool by the mean of its tokens, but by {', '.join(modes)}")


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Return class and folder of every module that sentence-transformers would run."""
    path = folder / "modules.json"
    try:
        return [(entry["type"].rpartition(".")[2], entry["path"]) for entry in _json(path, list)]
    except (LookupError, TypeError, AttributeError) as error:
        raise _unreadable(path, "it holds no list of modules") from error


def _pooling_modes(config: dict[str, Any]) -> list[str]:
    if (modes := config.get("pooling_mode")) is not None:
        return [modes] if isinstance(modes, str) else list(modes)
    # Older versions wrote a flag for each.
    flags = {name: used for name, used in config.items() if name.startswith("pooling_mode_")}
    return [name for name, used in flags.items() if used] or [f"none of {len(flags)}"] * bool(flags)


def _unlike(folder: Path, what: str) -> ModelLoadError:
    return ModelLoadError(
        f"The model in {folder} {what}", "Write a factory for it and name that as package.module:factory."
    )


def _json(path: Path, kind: type[Any]) -> Any:
    """Read settings of a `kind`; an empty one where there is no such file."""
    try:
        loaded = json.loads(path.read_text()) if path.exists() else kind()
        if not isinstance(loaded, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return loaded


def _unreadable(path: Path, why: object) -> ModelLoadError:
    return ModelLoadError(f"{path} cannot be read: {why}", "Copy it from the model anew.")


def _transformers() -> Any:
    """Import transformers, quiet and offline."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("--task embed", "transformers", "embed")
    # Everything is on disk: never ask the network, not even for a newer version.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
