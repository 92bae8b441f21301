"""Programs saved by ``torch.export.save``, and what inside such a file is refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..errors import ModelLoadError
from .names import brief


def load_exported(path: Path, *, allow_pickle: bool) -> nn.Module:
    """Loads a program saved by ``torch.export.save``.

    Raises:
        ModelLoadError: When it is damaged, or holds native code or pickles that were not allowed.
    """
    try:
        if not allow_pickle:
            _refuse_pickles(path)
        with _weights_only_loading():
            return torch.export.load(path).module()
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"{path} cannot be loaded as an exported program: {type(error).__name__}: {brief(error)}",
            "Make it with torch.export.save(torch.export.export(...), path).",
        ) from error


# What torch.export.save writes when nothing in it needs a pickle, apart from the example inputs, which
# load with weights_only.
_PLAIN_MEMBER = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/.*|version"
    r"|models/[^/]+\.json|data/sample_inputs/[^/]+\.pt"
    r"|data/weights/([^/]*_config\.json|weight_\d+)"
    r"|data/constants/([^/]*_config\.json|tensor_\d+)"
    r"|extra/.*)"
)


def _refuse_pickles(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if min(member.header_offset for member in archive.infolist()) != 0:
            # A file that lost its end shows an archive inside it instead of itself.
            raise zipfile.BadZipFile("the archive does not begin where the file does")
        for name in archive.namelist():
            if not _PLAIN_MEMBER.fullmatch(name) or (
                name.endswith("_config.json") and '"use_pickle": true' in _normal_json(archive, name)
            ):
                raise ModelLoadError(
                    f"{path} holds {name}, which would load a pickle or native code",
                    "Export the model again, or give --allow-unsafe-pickle if you trust whoever made it.",
                )


def _normal_json(archive: zipfile.ZipFile, name: str) -> str:
    return json.dumps(json.loads(archive.read(name)))


@contextlib.contextmanager
def _weights_only_loading() -> Iterator[None]:
    """Holds torch.export's own calls of torch.load, some of which ask for any pickle, to weights only."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
