"""Digests that processes compare."""

from __future__ import annotations

import hashlib


def digest_of(text: str) -> int:
    """Return a number of 62 bits that differs, as good as surely, for different texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
