"""Classes of the tokens of texts, put together to entities as transformers' pipeline does it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..steps import Steps, same
from .folders import arguments_taken, import_transformers, load_pretrained, load_tokenizer, max_length
from .packing import with_packed_base
from .task_options import TaskOptions
from .texts import PadTokens

Window = Mapping[str, Any]
"""A part of a text that the model takes at once: lists with an entry per token, and the text."""


class TokenClassifier(nn.Module):
    """A model with a head that gives numbers for the classes of every token.

    Args:
        model: gives `logits` [windows, length, number of classes].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `logits` [windows, length, number of classes]."""
        return {"logits": self.model(**inputs).logits}


def load_token_classifier(
    folder: Path, options: TaskOptions, *, allow_pickle: bool
) -> tuple[nn.Module, Steps]:
    """Load what `--task tokens` needs.

    Raises:
        ModelLoadError: the folder holds no model for tokens.
    """
    model = load_pretrained(folder, "AutoModelForTokenClassification")
    tokenizer = load_tokenizer(folder)
    windows = Windows(tokenizer, max_length(tokenizer, model.config), arguments_taken(model))
    # The pipeline of the library runs nothing here: it puts entities together.
    pipeline = import_transformers().TokenClassificationPipeline(model=model, tokenizer=tokenizer)
    finish = Entities(pipeline, options.aggregation or "none")
    steps = Steps(windows, PadWindows(PadTokens.of(tokenizer)), same, _num_tokens, finish)
    return TokenClassifier(with_packed_base(model)), steps


class Windows:
    """Texts -> windows that overlap by a quarter, so that no part of a long text is lost.

    Args:
        tokenizer: of the folder; it knows where in the text each token is.
        max_length: tokens of a window.
        arguments: names of what the model takes.
    """

    def __init__(self, tokenizer: Any, max_length: int, arguments: frozenset[str]) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._arguments = [name for name in ("input_ids", "token_type_ids") if name in arguments]
        self([""])  # changes the tokenizer's settings, which fails while another thread uses it

    def __call__(self, values: Sequence[Any]) -> list[list[Window]]:
        """Tokenize all texts at once."""
        for value in values:
            if not isinstance(value, str):
                raise TypeError(f"expected text, got {value!r:.80}; choose the text with --column")
        encoded = self._tokenizer(
            list(values),
            truncation=True,
            max_length=self._max_length,
            stride=self._max_length // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        items: list[list[Window]] = [[] for _ in values]
        names = [*self._arguments, "offset_mapping", "special_tokens_mask"]
        names = [name for name in names if name in encoded]
        for number, text in enumerate(encoded["overflow_to_sample_mapping"]):
            window = {name: encoded[name][number] for name in names}
            items[text].append({**window, "sentence": values[text]})
        return items


class PadWindows:
    """Windows of the texts of a batch -> keyword arguments of the model.

    Args:
        pad: pads the tokens.
    """

    def __init__(self, pad: PadTokens) -> None:
        self._pad = pad

    def __call__(self, items: Sequence[list[Window]]) -> dict[str, torch.Tensor]:
        """Pad all windows to the longest."""
        names = [name for name in ("input_ids", "token_type_ids") if name in items[0][0]]
        return self._pad([{name: window[name] for name in names} for item in items for window in item])


class Entities:
    """Makes a list of entities for each text.

    Args:
        pipeline: of transformers, for token classification.
        aggregation: what it calls `aggregation_strategy`.
    """

    def __init__(self, pipeline: Any, aggregation: str) -> None:
        self._pipeline = pipeline
        module = importlib.import_module("transformers.pipelines.token_classification")
        self._strategy = module.AggregationStrategy(aggregation)

    def __call__(
        self, output: Mapping[str, torch.Tensor], items: Sequence[list[Window]]
    ) -> dict[str, list[Any]]:
        """Return `entities`: dicts with class, score, word, and where in the text it starts and ends."""
        rows = iter(output["logits"].float().cpu())
        return {"entities": [self._of_text(item, rows) for item in items]}

    def _of_text(self, item: list[Window], rows: Any) -> list[dict[str, Any]]:
        windows = []
        for window in item:
            length = len(window["input_ids"])
            windows.append(
                {
                    "logits": next(rows)[None, :length],
                    "input_ids": torch.tensor([window["input_ids"]]),
                    "offset_mapping": torch.tensor([window["offset_mapping"]]),
                    "special_tokens_mask": torch.tensor([window["special_tokens_mask"]]),
                    "sentence": window["sentence"],
                }
            )
        found = self._pipeline.postprocess(windows, aggregation_strategy=self._strategy)
        return [{**entity, "score": float(entity["score"])} for entity in found]


def _num_tokens(item: list[Window]) -> int:
    return sum(len(window["input_ids"]) for window in item)
