"""Every public error. The class builds its message: the cause, then the remedy."""

from __future__ import annotations


class AsyncDPError(Exception):
    """Base of every error that asyncdp itself raises."""
