"""Classes of texts and images, and scores of pairs of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ModelLoadError
from ..steps import Steps, length_of, same
from .folders import arguments_taken, load_config, load_pretrained, load_tokenizer, max_length
from .images import Process, load_image_processor, stack_pixels
from .packing import with_packed_base
from .sentence_folder import SentenceFolder
from .task_options import TaskOptions
from .texts import PadTokens, Tokenize, num_tokens

Scores = Callable[[torch.Tensor], torch.Tensor]


class Classifier(nn.Module):
    """A model with a head that gives numbers for classes, and what makes scores of them.

    Args:
        model: gives `logits` [batch, number of classes].
        scores: applied to them.
    """

    def __init__(self, model: nn.Module, scores: Scores) -> None:
        super().__init__()
        self.model = model
        self._scores = scores
        # What a decoder keeps for its next token would be thrown away.
        self._settings = {"use_cache": False} if "use_cache" in arguments_taken(model) else {}

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `logits` and `scores`, both [batch, number of classes], in float32 at least."""
        logits = self.model(**inputs, **self._settings).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"logits": logits, "scores": self._scores(logits)}


def load_classifier(folder: Path, options: TaskOptions, *, allow_pickle: bool) -> tuple[nn.Module, Steps]:
    """Load what `--task classify` needs: the model of texts, pairs of texts, or images.

    Raises:
        ModelLoadError: the folder holds no classifier.
    """
    config = load_config(folder)
    scores = _scores_of(config)
    names = [config.id2label[index] for index in range(config.num_labels)]
    if _is_of_images(config):
        model = load_pretrained(folder, "AutoModelForImageClassification")
        steps = Steps(Process(load_image_processor(folder)), stack_pixels, same, length_of)
    else:
        model = _load_text_model(folder)
        steps = _text_steps(folder, model, pairs="allowed")
    return Classifier(model, scores), dataclasses.replace(steps, finish=Label(names))


def load_reranker(folder: Path, options: TaskOptions, *, allow_pickle: bool) -> tuple[nn.Module, Steps]:
    """Load what `--task rerank` needs: a model of pairs, as a cross encoder of sentence-transformers.

    Raises:
        ModelLoadError: the folder holds no model of pairs, or one that does more.
        JobUsageError: an option does not fit the folder.
    """
    settings = SentenceFolder.read(folder)
    kinds = [kind for kind, _ in settings.modules]
    if kinds not in ([], ["Transformer"]):
        raise ModelLoadError(
            f"The model in {folder} has modules {', '.join(kinds)}, and --task rerank runs a Transformer",
            "Write a factory for it and name that as package.module:name.",
        )
    model = _load_text_model(settings.encoder)
    prompt = settings.find_prompt(options.prompt, options.prompt_name)
    steps = _text_steps(settings.encoder, model, pairs="always", prompt=prompt, limit=settings.max_seq_length)
    activation = _activation(settings, model.config)
    return Classifier(model, activation), dataclasses.replace(steps, finish=_score)


class Label:
    """Adds the most probable class of each record.

    Args:
        names: of the classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __call__(self, output: Mapping[str, torch.Tensor], items: Sequence[Any]) -> dict[str, Any]:
        """Return `label`, its `score`, and the `logits` of all classes."""
        best, which = output["scores"].max(1)
        labels = [self._names[index] for index in which.tolist()]
        return {"label": labels, "score": best, "logits": output["logits"]}


def _score(output: Mapping[str, torch.Tensor], items: Sequence[Any]) -> dict[str, Any]:
    """Return `score` of each pair: a number, or one for each class where there are several."""
    scores = output["scores"]
    return {"score": scores.squeeze(1) if scores.shape[1] == 1 else scores}


def _load_text_model(folder: Path) -> Any:
    model = load_pretrained(folder, "AutoModelForSequenceClassification")
    # The head of a decoder looks for the last token that is no padding.
    if model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    return with_packed_base(model)


def _text_steps(folder: Path, model: Any, *, pairs: str, prompt: str = "", limit: int | None = None) -> Steps:
    tokenizer = load_tokenizer(folder)
    tokenize = Tokenize(
        tokenizer,
        limit or max_length(tokenizer, model.config),
        arguments=arguments_taken(model),
        prompt=prompt,
        pairs=pairs,
    )
    return Steps(tokenize, PadTokens.of(tokenizer), same, num_tokens)


def _is_of_images(config: Any) -> bool:
    return any("ForImageClassification" in name for name in config.architectures or ())


def _scores_of(config: Any) -> Scores:
    """Return what makes scores of logits, as transformers' pipelines choose it."""
    if config.problem_type == "regression":
        return same
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return torch.sigmoid
    return _softmax


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(1)


def _activation(settings: SentenceFolder, config: Any) -> Scores:
    """Return what makes scores of the logits of pairs, as sentence-transformers chooses it."""
    name = settings.settings.get("activation_fn")
    name = name or (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    name = name or getattr(config, "sbert_ce_default_activation_function", None)
    if name is not None:
        return settings.activation(name)
    return torch.sigmoid if config.num_labels == 1 else same
