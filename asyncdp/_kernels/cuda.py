"""Compiled kernels for CUDA tensors."""

from __future__ import annotations

from .reference import gather, reduce_add_many, split_copy

__all__ = ["gather", "reduce_add_many", "split_copy"]
