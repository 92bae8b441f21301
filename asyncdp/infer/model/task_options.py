"""Options of the tasks that run over Hugging Face folders."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection

from ...errors import JobUsageError
from ..option_fields import option

TASKS = ("embed", "classify", "tokens", "rerank", "generate", "caption", "transcribe")

_GENERATING = ("generate", "caption")

USED_BY: dict[str, tuple[str, ...]] = {
    "prompt": ("embed", "rerank", "generate"),
    "prompt_name": ("embed", "rerank"),
    "truncate_dim": ("embed",),
    "precision": ("embed",),
    "calibration": ("embed",),
    "aggregation": ("tokens",),
    "max_new_tokens": (*_GENERATING, "transcribe"),
    **dict.fromkeys(("temperature", "top_k", "top_p", "seed", "stop", "cache"), _GENERATING),
    **dict.fromkeys(("language", "timestamps", "chunk_seconds", "num_beams"), ("transcribe",)),
}
"""Which tasks an option is for."""

_CHOICES: dict[str, Collection[str]] = {
    "task": TASKS,
    "precision": ("float32", "int8", "uint8", "binary", "ubinary"),
    "aggregation": ("none", "simple", "first", "average", "max"),
    "cache": ("dynamic", "static"),
    "timestamps": ("segments", "words", "chars"),
}

_LEAST = {"truncate_dim": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 1, "num_beams": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a task does; None and the empty tuple leave it to the folder.

    Attributes:
        task: one of `TASKS`; None lets the folder decide.
        prompt, prompt_name: text before every text, or its name in the folder's settings.
        truncate_dim: how many entries of a vector are kept.
        precision: what vectors are quantised to, as `quantize_embeddings` of sentence-transformers does.
        calibration: .npy file with vectors like those of the job, [n, width], whose least and greatest
            entries are the range of int8 and uint8.
        aggregation: how tokens are put together to entities, as in transformers' pipeline.
        max_new_tokens: the most tokens that are generated for a record.
        temperature, top_k, top_p: of sampling; a temperature of 0 takes the most probable token.
        seed: of sampling; a record's text depends on it and on the record's position.
        stop: texts that end the generated text and are left out of it.
        cache: keys and values grow with the text (dynamic) or have their place from the start (static).
        language: that is spoken, by name or code; None lets a model of several find it out.
        timestamps: what is given the times at which it is said.
        chunk_seconds: of the stretches that a sound is cut into, which overlap.
        num_beams: texts that are kept in view while one is written.
    """

    task: str | None = option(None, "Of a folder: embed classify tokens rerank generate caption transcribe.")
    prompt: str | None = option(None, "embed rerank generate: before every text.")
    prompt_name: str | None = option(None, "embed rerank: a prompt of the folder.")
    truncate_dim: int | None = option(None, "embed: entries of a vector to keep.")
    precision: str | None = option(None, "embed: float32 int8 uint8 binary ubinary.")
    calibration: str | None = option(None, "embed: .npy of vectors, for int8.")
    aggregation: str | None = option(None, "tokens: none simple first average max.")
    max_new_tokens: int | None = option(None, "generate caption transcribe: most tokens.")
    temperature: float | None = option(None, "generate caption: 0 never samples.")
    top_k: int | None = option(None, "generate caption: of sampling.")
    top_p: float | None = option(None, "generate caption: of sampling.")
    seed: int | None = option(None, "generate caption: of sampling.")
    stop: tuple[str, ...] = option((), "generate caption: ends a text; repeatable.")
    cache: str | None = option(None, "generate caption: dynamic static.")
    language: str | None = option(None, "transcribe: that is spoken; else found out.")
    timestamps: str | None = option(None, "transcribe: segments words chars.")
    chunk_seconds: float | None = option(None, "transcribe: cut long sounds into such.")
    num_beams: int | None = option(None, "transcribe: 5 where the folder is silent.")

    def check_choices(self) -> None:
        """Check each option by itself.

        Raises:
            JobUsageError: a value that is no choice or no number of use.
        """
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                listed = ", ".join(choices)
                raise JobUsageError(f"--{name} {value} is unknown", f"Choose one of {listed}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise JobUsageError(f"{_flag(name)} is {value}", f"Give {least} or more.")
        if self.chunk_seconds is not None and not 0 < self.chunk_seconds <= sys.float_info.max:
            raise JobUsageError(
                f"--chunk-seconds is {self.chunk_seconds}", "Give a number above 0, as in 30."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise JobUsageError(f"--top-p is {self.top_p}", "Give a number above 0, and 1 at most.")
        if "" in self.stop:
            raise JobUsageError("--stop is an empty text", "Name the text that ends the generated one.")
        if self.prompt is not None and self.prompt_name is not None:
            raise JobUsageError("--prompt and --prompt-name are both given", "Give one of them.")
        if (self.precision in ("int8", "uint8")) != (self.calibration is not None):
            raise JobUsageError(
                f"--precision {self.precision} and --calibration {self.calibration} do not go together",
                "int8 and uint8 need a .npy file of vectors [n, width] like those of the job, "
                "from which their range is taken; nothing else does.",
            )

    def check_used(self, task: str | None) -> None:
        """Check that every option that was given is one of the task's.

        Args:
            task: the one that runs, None where the model is no folder.

        Raises:
            JobUsageError: with the tasks that the option is for.
        """
        for name, tasks in USED_BY.items():
            if getattr(self, name) not in (None, ()) and task not in tasks:
                what = f"--task {task}" if task else "a model that is no Hugging Face folder"
                raise JobUsageError(
                    f"{_flag(name)} has no effect with {what}", f"It is for --task {' or '.join(tasks)}."
                )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
