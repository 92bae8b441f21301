"""The base class of every error."""

from __future__ import annotations


class AsyncDPError(Exception):
    """Base class of every error that asyncdp itself raises."""
