"""Weights from files beside a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ...errors import ModelLoadError
from .names import brief


def load_weights(module: nn.Module, path: Path, *, allow_pickle: bool) -> None:
    """Load weights into `module`: safetensors, or a pickle when that was allowed by name.

    Raises:
        ModelLoadError: the file is damaged, is a pickle, or names other parameters.
    """
    import safetensors.torch

    try:
        if path.suffix == ".safetensors":
            safetensors.torch.load_model(module, path)
        elif allow_pickle:
            module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            raise ModelLoadError(
                f"{path} is not a .safetensors file, and a pickle can run any code while it loads",
                "Convert it to safetensors, or give --allow-unsafe-pickle if you trust its author.",
            )
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"The weights {path} do not fit or cannot be read: {brief(error)}",
            "Check that they were saved from the model that --model makes.",
        ) from error
