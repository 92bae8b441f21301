"""What the outputs of a job depend on: its identity when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .model.models import LoadedModel
from .model.names import source_of
from .options import TIMES, InferOptions
from .output.files import digest_large_file, digest_weights, times_of_large_files
from .readers import STDIN, InputFile, Inputs

# These change which rows come out or how they are grouped into batches, which changes the last bits.
_FINGERPRINTED = (
    *("model", "task", "dtype", "autocast", "compile", "preprocess", "collate", "postprocess", "columns"),
    *("id_column", "batch_size", "max_batch_cost", "window", "shard_size", "output_format", "order"),
)


def fingerprint(options: InferOptions, inputs: Inputs, model: LoadedModel) -> dict[str, Any]:
    """Returns all that the outputs depend on, as plain JSON: options, code, weights and input.

    Devices, workers and the handling of errors are left out: a job may continue with others.
    """
    chosen = {name: getattr(options, name) for name in _FINGERPRINTED}
    chosen["input_format"] = inputs.format_name
    chosen["shard"] = list(options.part)
    if model.made_by_code:
        # Weights that the factory read from somewhere, or that it drew at random.
        chosen["model weights"] = digest_weights(model.module)
    else:
        chosen["model"] = None  # its files tell which one it is, wherever they lie
    files = {**model.files, **_sources(options)}
    chosen |= {name: digest_large_file(path) for name, path in files.items()}
    chosen["input"] = [_input_entry(file) for file in inputs.files]
    on_disk = [file.path for file in inputs.files if file.path != STDIN]
    chosen[TIMES] = times_of_large_files([*files.values(), *on_disk])
    plain: dict[str, Any] = json.loads(json.dumps(chosen))
    return plain


def _sources(options: InferOptions) -> dict[str, Path]:
    """Returns the files with the functions around the model."""
    named = {name: getattr(options, name) for name in ("preprocess", "collate", "postprocess")}
    found = {name: source_of(spec, f"--{name}") for name, spec in named.items() if spec}
    return {f"{name} file {source.name}": source for name, source in found.items() if source}


def _input_entry(file: InputFile) -> list[Any]:
    if file.path == STDIN:
        return ["-"]
    # By name and contents: the folder may move between machines and runs.
    try:
        return [file.path.name, file.path.stat().st_size, digest_large_file(file.path)]
    except OSError as error:
        raise file.broken(error) from error
