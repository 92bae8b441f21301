"""Reduce-add and gather: compiled kernels on CUDA, plain torch everywhere else.

Importing this package imports neither Numba nor cuda.core; the first CUDA call does.
"""

from .chain import KernelReport, report
from .dispatch import gather, reduce_add, reduce_add_many
from .first_use import warm_up
from .transfer import PathStatistics, path_statistics

__all__ = [
    "KernelReport",
    "PathStatistics",
    "gather",
    "path_statistics",
    "reduce_add",
    "reduce_add_many",
    "report",
    "warm_up",
]
