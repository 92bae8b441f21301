"""What files need to survive a power loss."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Make new names in a folder survive a power loss."""
    if os.name == "nt":  # folders cannot be opened there, and renames are durable
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
