"""The tasks over Hugging Face folders, and which one a folder is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from ...errors import JobUsageError
from ..steps import Steps
from .classify import load_classifier, load_reranker
from .embed import load_embedding
from .entities import load_token_classifier
from .folders import files_read, read_json
from .generate import load_captioner, load_generator
from .task_options import TASKS, TaskOptions
from .transcribe import load_transcriber


@dataclasses.dataclass(frozen=True)
class TaskModel:
    """What a folder becomes for a task.

    Attributes:
        module: called with what the steps collate.
        steps: around the module.
        files: what the outputs depend on, by what they are.
    """

    module: nn.Module
    steps: Steps
    files: dict[str, Path]


_LOADERS: Mapping[str, Callable[..., tuple[nn.Module, Steps]]] = {
    "embed": load_embedding,
    "classify": load_classifier,
    "tokens": load_token_classifier,
    "rerank": load_reranker,
    "generate": load_generator,
    "caption": load_captioner,
    "transcribe": load_transcriber,
}


def load_task(folder: Path, options: TaskOptions, *, compile: bool, allow_pickle: bool) -> TaskModel:
    """Load the model of a folder and the steps of the task.

    Args:
        folder: as `save_pretrained` writes it.
        options: the task, or None for the one that the folder is for, and what belongs to it.
        compile: whether the module will be compiled.
        allow_pickle: whether weights beside those of transformers may be pickles.

    Raises:
        JobUsageError: the folder is for no single task, or an option is for another one.
        ModelLoadError: the folder does not hold what the task needs.
    """
    task = options.task or find_task(folder)
    options.check_used(task)
    if compile and task in ("generate", "caption", "transcribe"):
        raise JobUsageError(f"--compile has no effect with --task {task}", "Leave it out.")
    module, steps = _LOADERS[task](folder, options, allow_pickle=allow_pickle)
    return TaskModel(module, steps, files_read(folder))


def find_task(folder: Path) -> str:
    """Return the task that a folder is for, as its settings say.

    Raises:
        JobUsageError: they do not say; with the choices.
    """
    choices = _choices(folder)
    if len(choices) == 1:
        return choices[0]
    raise JobUsageError(
        f"The settings of {folder} do not say what to do with it",
        f"Give --task {' or '.join(choices or TASKS)}.",
    )


# By how the name of a model's class ends; the first that fits counts.
_BY_ARCHITECTURE = {
    "ForSequenceClassification": "classify",
    "ForImageClassification": "classify",
    "ForTokenClassification": "tokens",
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
    "ForConditionalGeneration": "generate",
    "ForSeq2SeqLM": "generate",
    "ForCTC": "transcribe",
    "ForSpeechSeq2Seq": "transcribe",
    "VisionEncoderDecoderModel": "caption",
    "EncoderDecoderModel": "generate",
    "EncoderModel": "embed",
    "Model": "embed",
}


def _choices(folder: Path) -> tuple[str, ...]:
    config = read_json(folder / "config.json")
    sentence = read_json(folder / "config_sentence_transformers.json")
    if sentence.get("model_type") == "CrossEncoder" or _CROSS_ENCODER & config.keys():
        return ("rerank",)
    if (folder / "modules.json").exists() or sentence:
        return ("embed",)
    names = config.get("architectures") or [""]
    task = next((task for end, task in _BY_ARCHITECTURE.items() if names[0].endswith(end)), None)
    if task == "generate" and _hears(folder):
        return ("transcribe",)
    sees = "vision_config" in config or (folder / "preprocessor_config.json").exists()
    if task == "classify" and "ForSequence" in names[0] and len(config.get("id2label", "ab")) == 1:
        return ("classify", "rerank")
    if task == "generate" and sees:
        return ("caption",)
    return () if task is None or (task == "embed" and sees) else (task,)


def _hears(folder: Path) -> bool:
    settings = [read_json(folder / f"{name}_config.json") for name in ("preprocessor", "processor")]
    return any({"feature_extractor", "feature_extractor_type"} & each.keys() for each in settings)


# What sentence-transformers writes into the settings of a model of pairs.
_CROSS_ENCODER = {"sentence_transformers", "sbert_ce_default_activation_function"}
