"""Programs saved by `torch.export.save`, and what inside such a file is refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ModelLoadError
from .exported_code import find_code, find_code_in_keys
from .names import brief


def load_exported(path: Path, *, allow_pickle: bool) -> nn.Module:
    """Load a program saved by `torch.export.save`.

    Raises:
        ModelLoadError: it is damaged, or holds Python, native code or pickles that were not allowed.
    """
    try:
        if not allow_pickle:
            _refuse_pickles_and_code(path)
        with _weights_only_loading():
            program = torch.export.load(path)
        if not allow_pickle and (text := find_code_in_keys(program.example_inputs)):
            raise _code_inside(path, text)
        return program.module()
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"{path} cannot be loaded as an exported program: {type(error).__name__}: {brief(error)}",
            "Make it with torch.export.save(torch.export.export(...), path).",
        ) from error


_ALLOW_OR_EXPORT = "Export the model again, or give --allow-unsafe-pickle if you trust its author."

# What torch.export.save writes when nothing in it needs a pickle, apart from the example inputs, which
# load with weights_only.
_PLAIN_MEMBER = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/.*|version"
    r"|models/[^/]+\.json|data/sample_inputs/[^/]+\.pt"
    r"|data/weights/([^/]*_config\.json|weight_\d+)"
    r"|data/constants/([^/]*_config\.json|tensor_\d+)"
    r"|extra/.*)"
)


def _refuse_pickles_and_code(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if min(member.header_offset for member in archive.infolist()) != 0:
            # A file that lost its end shows an archive inside it instead of itself.
            raise zipfile.BadZipFile("the archive does not begin where the file does")
        names = archive.namelist()
        if len({name.lower() for name in names}) != len(names):
            # Torch finds names whatever their case, and might load another member than was checked.
            raise zipfile.BadZipFile("two members have the same name")
        for name in names:
            if not _PLAIN_MEMBER.fullmatch(name) or (
                name.endswith("_config.json") and '"use_pickle": true' in json.dumps(_json(archive, name))
            ):
                raise ModelLoadError(
                    f"{path} holds {name}, which would load a pickle or native code", _ALLOW_OR_EXPORT
                )
            if "/models/" in name and (text := find_code(_json(archive, name))):
                raise _code_inside(path, text)


def _json(archive: zipfile.ZipFile, name: str) -> Any:
    return json.loads(archive.read(name).decode())  # as torch reads it


def _code_inside(path: Path, text: str) -> ModelLoadError:
    return ModelLoadError(
        f"{path} holds {text[:200]!r}, by which it could run Python or write files of its own",
        _ALLOW_OR_EXPORT,
    )


@contextlib.contextmanager
def _weights_only_loading() -> Iterator[None]:
    """Hold torch.export's own calls of torch.load, some of which ask for any pickle, to weights only."""
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
