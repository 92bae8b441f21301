"""Loaded kernels and their launch."""

from __future__ import annotations

import torch


def load_all(device: torch.device) -> None:
    """Build and load every kernel for `device`."""
