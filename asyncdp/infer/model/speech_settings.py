"""What a folder and the options say of speech recognition, checked before any sound is heard."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ...errors import JobUsageError, ModelLoadError
from .folders import import_transformers
from .task_options import TaskOptions

_TIMESTAMPS: dict[str, dict[str, bool | str]] = {
    "whisper": {"segments": True, "words": "word"},
    "ctc": {"words": "word", "chars": "char"},
}
"""What the pipeline calls them, by kind of model and option."""


def kind_of(config: Any, folder: Path) -> str:
    """Return whether a folder's model is Whisper, another one that generates (seq2seq), or one of CTC.

    Raises:
        ModelLoadError: it is another one.
    """
    transformers = import_transformers()
    if config.model_type == "whisper":
        return "whisper"
    if any(name.endswith("ForCTC") for name in config.architectures or ()):
        return "ctc"
    if type(config) in transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING and config.is_encoder_decoder:
        return "seq2seq"
    raise ModelLoadError(
        f"The model in {folder} is no Whisper, none of CTC, and no encoder and decoder of speech, "
        f"but {', '.join(config.architectures or [config.model_type])}",
        "Write a factory for it and name that as package.module:name.",
    )


def _check_nothing_generated(options: TaskOptions) -> None:
    for name in ("language", "num_beams", "max_new_tokens"):
        if getattr(options, name) is not None:
            raise JobUsageError(
                f"--{name.replace('_', '-')} has no effect with a model of CTC",
                "Leave it out: such a model generates nothing, and knows one language.",
            )


def generate_settings(model: Any, kind: str, options: TaskOptions) -> dict[str, Any] | None:
    """Return the settings of `generate`: what the options say, the folder, and else the pipeline's own.

    None for a model that does not generate.

    Raises:
        ModelLoadError: the folder asks for what is not done.
        JobUsageError: an option does not fit the model.
    """
    if kind == "ctc":
        _check_nothing_generated(options)
        return None
    config = model.generation_config
    if config.do_sample:
        raise ModelLoadError(
            "The folder asks for sampling, and transcripts are not sampled",
            "Set do_sample to false in its generation_config.json.",
        )
    stated = config.to_diff_dict()
    settings: dict[str, Any] = {} if "num_beams" in stated else {"num_beams": 5}
    if options.num_beams is not None:
        settings["num_beams"] = options.num_beams
    if options.max_new_tokens is not None:
        settings["max_new_tokens"] = options.max_new_tokens
    elif not {"max_new_tokens", "max_length"} & stated.keys():
        settings["max_new_tokens"] = 256
    if options.language is not None:
        settings["language"] = _checked_language(config, kind, options.language)
    return settings


def _checked_language(config: Any, kind: str, language: str) -> str:
    known = getattr(config, "lang_to_id", None)
    if kind != "whisper" or not known:
        raise JobUsageError(
            f"--language {language} has no effect with this model", "Leave it out: it knows one language."
        )
    codes = importlib.import_module("transformers.models.whisper.tokenization_whisper").TO_LANGUAGE_CODE
    code = codes.get(language.lower(), language.lower().strip("<|>"))
    if f"<|{code}|>" not in known:
        listed = ", ".join(token.strip("<|>") for token in known)
        raise JobUsageError(f"--language {language} is unknown to this model", f"It knows {listed}.")
    return str(code)


def timestamps_of(model: Any, kind: str, option: str | None) -> bool | str | None:
    """Return what the pipeline calls `return_timestamps`.

    Raises:
        JobUsageError: the model knows none of this kind.
    """
    if option is None:
        return getattr(model.generation_config, "return_timestamps", None) if kind == "whisper" else None
    known = _TIMESTAMPS.get(kind, {})
    if option not in known:
        raise JobUsageError(
            f"This model knows no --timestamps {option}",
            f"Give {' or '.join(known)}." if known else "Leave it out.",
        )
    needed = {True: "no_timestamps_token_id", "word": "alignment_heads"}.get(known[option])
    if kind == "whisper" and getattr(model.generation_config, str(needed), None) is None:
        raise JobUsageError(
            f"The folder's generation_config.json has no {needed}, which --timestamps {option} needs",
            "Copy that of the model's authors, or leave --timestamps out.",
        )
    return known[option]


def samples_of_output(model: Any, options: TaskOptions) -> int:
    """Return how many samples a model of CTC makes one output of, 1 where nothing depends on it.

    Raises:
        JobUsageError: the folder does not say it, and an option needs it.
    """
    found = getattr(model.config, "inputs_to_logits_ratio", None)
    if found is not None and model.main_input_name == "input_values":
        return int(found)
    for name in ("timestamps", "chunk_seconds"):
        if getattr(options, name) is not None:
            raise JobUsageError(
                f"--{name.replace('_', '-')} needs the time that an output of the model stands for, "
                f"which {type(model).__name__} does not state",
                "Leave it out.",
            )
    return 1


def chunk_samples(extractor: Any, align_to: int, kind: str, seconds: float | None) -> int | None:
    """Return how many samples each stretch of a long sound has, None to hear it as a whole.

    Raises:
        JobUsageError: a stretch is longer than the model hears at once, or shorter than it can.
    """
    if seconds is None:
        return None
    samples = round(seconds * extractor.sampling_rate / align_to) * align_to
    window = getattr(extractor, "n_samples", None) if kind == "whisper" else None
    if window is not None and samples > window:
        raise JobUsageError(
            f"--chunk-seconds is {seconds:g}",
            f"This model hears {window / extractor.sampling_rate:g} seconds at once: give no more.",
        )
    if round(samples / 6 / align_to) < 1:
        raise JobUsageError(f"--chunk-seconds is {seconds:g}", "Give more: chunks overlap by a third.")
    return int(samples)
