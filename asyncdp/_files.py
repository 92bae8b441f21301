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


def sync_tree(path: Path) -> None:
    """Make all that is in a folder, at any depth, survive a power loss."""
    for each in path.rglob("*"):
        if each.is_file():
            with open(each, "rb+") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(each)
    sync_folder(path)
