"""Texts of what is said in sounds, as transformers' pipeline of speech recognition writes them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..steps import Steps, same
from .folders import import_transformers, load_config, load_pretrained, load_tokenizer
from .speech_settings import chunk_samples, generate_settings, kind_of, samples_of_output, timestamps_of
from .task_options import TaskOptions
from .waveforms import Hear, Piece, length_heard, load_feature_extractor, pieces_by_shape


class Transcriber(nn.Module):
    """A model that hears, and writes tokens for every piece.

    Args:
        model: of transformers; it gives logits for stretches of the sound (CTC), or generates.
        settings: of `generate`, None for a model of logits.
    """

    def __init__(self, model: Any, settings: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.model = model
        self._settings = settings

    def forward(self, groups: Sequence[Mapping[str, Any]], order: torch.Tensor) -> dict[str, torch.Tensor]:
        """Write tokens.

        Args:
            groups: inputs of the model, pieces of one shape each.
            order: places of the pieces among those of all groups.

        Returns:
            `tokens` [pieces, most tokens], how many of them count as `lengths`, and for words of
            Whisper their `times`, in seconds.
        """
        found = [self._of_group(group) for group in groups]
        rows = {name: [row for each in found for row in each[name]] for name in found[0]}
        lengths = torch.tensor([len(row) for row in rows["tokens"]], device=order.device)
        padded = {name: nn.utils.rnn.pad_sequence(values, batch_first=True) for name, values in rows.items()}
        return {name: values[order] for name, values in {**padded, "lengths": lengths}.items()}

    def _of_group(self, group: Mapping[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        if self._settings is None:
            return {"tokens": list(self.model(**group).logits.argmax(-1))}
        found = self.model.generate(**group, **self._settings)
        if not isinstance(found, Mapping):
            return {"tokens": [self._without_padding(row) for row in found]}
        if "segments" not in found:
            times = list(found["token_timestamps"])
        else:
            times = [_times(segments) for segments in found["segments"]]
        tokens = [row[: len(own)] for row, own in zip(found["sequences"], times, strict=True)]
        return {"tokens": tokens, "times": times}

    def _without_padding(self, row: torch.Tensor) -> torch.Tensor:
        """Leave out what stands behind a text because another one of the group is longer."""
        counting = (row != self.model.generation_config.pad_token_id).nonzero()
        return row[: int(counting.max()) + 1 if len(counting) else 0]


def _times(segments: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([segment["token_timestamps"] for segment in segments])


def load_transcriber(folder: Path, options: TaskOptions, *, allow_pickle: bool) -> tuple[nn.Module, Steps]:
    """Load what `--task transcribe` needs.

    Raises:
        ModelLoadError: the folder holds no model of speech that can be run.
        JobUsageError: an option does not fit the folder.
    """
    config = load_config(folder)
    kind = kind_of(config, folder)
    model = load_pretrained(folder, "AutoModelForCTC" if kind == "ctc" else "AutoModelForSpeechSeq2Seq")
    extractor, tokenizer = load_feature_extractor(folder), load_tokenizer(folder)
    settings = generate_settings(model, kind, options)
    times = timestamps_of(model, kind, options.timestamps)
    if settings is not None and times:
        settings["return_timestamps"] = True
        if times == "word":
            settings |= {"return_token_timestamps": True, "return_segments": True}
    align_to = samples_of_output(model, options) if kind == "ctc" else 1
    hear = Hear(extractor, chunk_samples(extractor, align_to, kind, options.chunk_seconds), align_to)
    # The pipeline of the library runs nothing here: it makes text of tokens.
    pipeline = import_transformers().AutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=tokenizer, feature_extractor=extractor, device="cpu"
    )
    finish = Transcripts(pipeline, align_to if kind == "ctc" else None, times)
    steps = Steps(hear, pieces_by_shape, same, length_heard, finish)
    return Transcriber(model, settings), steps


class Transcripts:
    """Makes a text of the tokens for each sound.

    Args:
        pipeline: of transformers, for speech recognition.
        align_to: samples that the model makes one output of; None where it generates.
        timestamps: what the pipeline calls `return_timestamps`.
    """

    def __init__(self, pipeline: Any, align_to: int | None, timestamps: bool | str | None) -> None:
        self._pipeline = pipeline
        self._align_to = align_to
        self._timestamps = timestamps

    def __call__(
        self, output: Mapping[str, torch.Tensor], items: Sequence[Sequence[Piece]]
    ) -> dict[str, list[Any]]:
        """Return `text`, and `chunks` where timestamps are wanted: dicts of text and timestamp."""
        on_cpu = {name: values.cpu() for name, values in output.items()}
        rows = iter(range(len(on_cpu["tokens"])))
        found = [self._of_sound(item, on_cpu, rows) for item in items]
        names = ("text", "chunks") if self._timestamps else ("text",)
        return {name: [each[name] for each in found] for name in names}

    def _of_sound(self, item: Sequence[Piece], output: Mapping[str, torch.Tensor], rows: Any) -> Any:
        outputs = []
        for piece in item:
            row = next(rows)
            length = int(output["lengths"][row])
            own: dict[str, Any] = {"tokens": output["tokens"][row : row + 1, :length]}
            if "times" in output:
                own["token_timestamps"] = output["times"][row : row + 1, :length]
            if "stride" in piece:
                own["stride"] = self._stride(piece["stride"])
            outputs.append(own)
        found = self._pipeline.postprocess(outputs, return_timestamps=self._timestamps)
        chunks = [{**chunk, "timestamp": list(chunk["timestamp"])} for chunk in found.get("chunks", ())]
        return {"text": found["text"], "chunks": chunks}

    def _stride(self, stride: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the length of a piece and how much of it overlaps at each end, in the model's outputs."""
        if self._align_to is None:
            return stride
        module = importlib.import_module("transformers.pipelines.automatic_speech_recognition")
        return module.rescale_stride([stride], 1 / self._align_to)[0]  # type: ignore[no-any-return]
