"""What is read from a Hugging Face folder on disk: settings, tokenizer, model; never code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import MissingExtraError, ModelLoadError
from .names import brief

_DEFAULT_MAX_LENGTH = 512

# What transformers leaves unread here: texts for people, code, and weights other than safetensors.
_UNREAD = frozenset({".md", ".py", ".bin", ".h5", ".msgpack", ".onnx", ".ot", ".gguf"})

_OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def import_transformers() -> Any:
    """Import transformers, quiet and offline.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("A Hugging Face folder", "transformers", "embed")
    # Everything is on disk: never ask the network, not even for a newer version.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_pretrained(folder: Path, auto_class: str, *, unused: str = "", **settings: Any) -> Any:
    """Load a model of transformers, from safetensors only and without running code of the folder.

    Args:
        folder: with config.json and model.safetensors.
        auto_class: name of the class of transformers that chooses the model's.
        unused: name of a part that is not used, and may lack its weights.
        settings: further arguments of `from_pretrained`.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelLoadError: the folder holds no such model, or one that lacks weights.
    """
    kind = getattr(import_transformers(), auto_class)
    try:
        model, found = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **_OFFLINE, **settings
        )
    except Exception as error:
        raise ModelLoadError(
            f"The folder {folder} holds no model that transformers can load: {brief(error)}",
            "It needs config.json and model.safetensors as save_pretrained writes them.",
        ) from error
    if missing := [name for name in sorted(found["missing_keys"]) if not unused or unused not in name]:
        names = ", ".join(missing[:5])
        raise ModelLoadError(
            f"The folder {folder} lacks weights of {type(model).__name__}, which would be random: {names}",
            "Choose the --task that the model was trained for, or copy all of its files.",
        )
    return model


def load_config(folder: Path) -> Any:
    """Load the settings of a folder's model.

    Raises:
        ModelLoadError: there are none.
    """
    try:
        return import_transformers().AutoConfig.from_pretrained(folder, **_OFFLINE)
    except Exception as error:
        raise ModelLoadError(
            f"The folder {folder} holds no model that transformers can load: {brief(error)}",
            "It needs config.json and model.safetensors as save_pretrained writes them.",
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder.

    Raises:
        ModelLoadError: the folder has none.
    """
    try:
        return import_transformers().AutoTokenizer.from_pretrained(folder, **_OFFLINE)
    except Exception as error:
        raise ModelLoadError(
            f"The folder {folder} holds no tokenizer: {brief(error)}",
            "Copy tokenizer.json and tokenizer_config.json of the model into it.",
        ) from error


def max_length(tokenizer: Any, config: Any) -> int:
    """Return the number of tokens that a text is cut to: what the tokenizer and the model take."""
    # A tokenizer that knows no limit has a number beyond all use.
    known = [tokenizer.model_max_length] if tokenizer.model_max_length < 10**9 else []
    positions = getattr(config, "max_position_embeddings", None)
    known += [positions] if isinstance(positions, int) and positions > 0 else []
    return int(min(known, default=_DEFAULT_MAX_LENGTH))


def arguments_taken(module: nn.Module) -> frozenset[str]:
    """Return the names of the arguments that a model is called with."""
    return frozenset(inspect.signature(module.forward).parameters)


def files_read(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that its outputs depend on, by what they are."""
    paths = [*folder.iterdir(), *folder.glob("*/config.json"), *folder.glob("*/*.safetensors")]
    names = {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path.is_file()}
    return {
        f"model file {name}": path
        for name, path in names.items()
        if not name.startswith(".") and path.suffix.lower() not in _UNREAD
    }


def read_json(path: Path, kind: type[Any] = dict) -> Any:
    """Read settings of a `kind`; an empty one where there is no such file.

    Raises:
        ModelLoadError: the file is damaged.
    """
    try:
        loaded = json.loads(path.read_text()) if path.exists() else kind()
        if not isinstance(loaded, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return loaded


def unreadable(path: Path, why: object) -> ModelLoadError:
    """Return the error for a file of settings that cannot be used."""
    return ModelLoadError(f"{path} cannot be read: {why}", "Copy it from the model anew.")
