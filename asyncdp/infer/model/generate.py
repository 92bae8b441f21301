"""Texts that a language model writes: after a text, from a text, or about an image."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ModelLoadError
from ..steps import Steps, length_of, same
from .folders import import_transformers, load_config, load_pretrained, load_tokenizer
from .images import Process, load_image_processor, stack_pixels
from .sampling import Choice, StopTexts, draws_of, make_warpers, without_sampling
from .task_options import TaskOptions
from .texts import PadTokens, num_tokens

_DEFAULT_NEW_TOKENS = 256

# With these settings padding before a text would change what is written after it.
_COUNTING = (
    "no_repeat_ngram_size",
    "min_length",
    "exponential_decay_length_penalty",
    "bad_words_ids",
    "sequence_bias",
)


class Generator(nn.Module):
    """A language model that writes a text for every record.

    Args:
        model: of transformers.
        config: of generation; what it says of drawing tokens is done here.
        options: how tokens are chosen and what ends a text.
        tokenizer: of the folder.
    """

    def __init__(self, model: Any, config: Any, options: TaskOptions, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self._warpers = make_warpers(config, options)
        self._config = without_sampling(config)
        # The model would add to a call's settings those of its own that the call leaves out.
        model.generation_config = copy.deepcopy(self._config)
        self._options = options
        self._tokenizer = tokenizer
        self._one_length = not model.config.is_encoder_decoder and any(
            getattr(config, name, None) for name in _COUNTING
        )

    def forward(self, positions: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Write texts.

        Args:
            positions: of the records in the input [batch].
            inputs: of the model.

        Returns:
            `tokens` [batch, most new tokens], with padding behind the end of a text.
        """
        mask = inputs.get("attention_mask")
        if not self._one_length or mask is None:
            return {"tokens": self._generate(positions, inputs)}
        lengths = mask.sum(1)
        tokens = mask.new_full((len(mask), self._config.max_new_tokens), self._config.pad_token_id)
        for length in lengths.unique().tolist():
            rows = lengths == length
            found = self._generate(positions[rows], {"input_ids": inputs["input_ids"][rows, -length:]})
            tokens[rows, : found.shape[1]] = found
        return {"tokens": tokens}

    def _generate(self, positions: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        draws = draws_of(positions.tolist(), self._config.max_new_tokens, self._options.seed or 0)
        choice = Choice(self._warpers, draws.to(positions.device))
        stops = [StopTexts(self._tokenizer, self._options.stop, choice)] if self._options.stop else []
        transformers = import_transformers()
        found: torch.Tensor = self.model.generate(
            **inputs,
            generation_config=copy.deepcopy(self._config),
            logits_processor=transformers.LogitsProcessorList([choice]),
            stopping_criteria=transformers.StoppingCriteriaList(stops),
        )
        return found[:, choice.start :]


def load_generator(folder: Path, options: TaskOptions, *, allow_pickle: bool) -> tuple[nn.Module, Steps]:
    """Load what `--task generate` needs.

    Raises:
        ModelLoadError: the folder holds no language model.
    """
    goes_on = not load_config(folder).is_encoder_decoder
    model = load_pretrained(folder, "AutoModelForCausalLM" if goes_on else "AutoModelForSeq2SeqLM")
    tokenizer = load_tokenizer(folder)
    config = _make_config(model, options, tokenizer)
    prompts = Prompts(
        tokenizer, _places(model), config.max_new_tokens if goes_on else 0, options.prompt or ""
    )
    pad = dataclasses.replace(PadTokens.of(tokenizer), left=goes_on)
    generator = Generator(model, config, options, tokenizer)
    return generator, _steps(prompts, pad, num_tokens, Texts(tokenizer, config, options.stop))


def load_captioner(folder: Path, options: TaskOptions, *, allow_pickle: bool) -> tuple[nn.Module, Steps]:
    """Load what `--task caption` needs.

    Raises:
        ModelLoadError: the folder holds no model that writes about an image alone.
    """
    config = load_config(folder)
    if any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index")):
        raise ModelLoadError(
            f"The model in {folder} wants a text with a mark for the image",
            "Write a factory for it and name that as package.module:name.",
        )
    model = load_pretrained(folder, "AutoModelForImageTextToText")
    tokenizer = load_tokenizer(folder)
    config = _make_config(model, options, tokenizer)
    process = Process(load_image_processor(folder))
    generator = Generator(model, config, options, tokenizer)
    return generator, _steps(process, stack_pixels, length_of, Texts(tokenizer, config, options.stop))


def _steps(preprocess: Any, collate: Any, cost: Any, finish: Texts) -> Steps:
    positioned = WithPositions(collate)
    return Steps(preprocess, positioned, same, cost, finish, takes_positions=True, counted="num_tokens")


def _make_config(model: Any, options: TaskOptions, tokenizer: Any) -> Any:
    """Return what the folder and the options say of generation; how tokens are drawn stays the folder's."""
    config = copy.deepcopy(model.generation_config)
    if (config.num_beams or 1) > 1 and make_warpers(config, options) is not None:
        raise ModelLoadError(
            f"The folder asks for {config.num_beams} beams, and beams are not sampled",
            "Set num_beams to 1 in its generation_config.json, or give --temperature 0.",
        )
    pads = [config.pad_token_id, tokenizer.pad_token_id, *_ends(config), 0]
    config.pad_token_id = next(pad for pad in pads if pad is not None)
    config.max_new_tokens = options.max_new_tokens or _most_new_tokens(config, model)
    config.max_length = None
    if options.cache == "static":
        config.cache_implementation = options.cache
    return config


def _most_new_tokens(config: Any, model: Any) -> int:
    if config.max_new_tokens:
        return int(config.max_new_tokens)
    # 20 is what transformers writes down where nobody has thought about it.
    if model.config.is_encoder_decoder and config.max_length not in (None, 20):
        return int(config.max_length) - 1
    places = _places(model)
    return _DEFAULT_NEW_TOKENS if places is None else min(_DEFAULT_NEW_TOKENS, max(places // 2, 1))


def _places(model: Any) -> int | None:
    """Return how many tokens a model takes, None where it knows no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


class Prompts:
    """Texts, or lists of chat messages, -> tokens that a model goes on with, or that it reads.

    Args:
        tokenizer: of the folder, whose chat template writes messages down.
        places: tokens that the model takes, None for any number.
        reserved: those of them that are for what it writes.
        prompt: stands before every text.
    """

    def __init__(self, tokenizer: Any, places: int | None, reserved: int, prompt: str) -> None:
        self._tokenizer = tokenizer
        self._places = places
        self._reserved = reserved
        self._prompt = prompt

    def __call__(self, values: Sequence[Any]) -> list[list[int]]:
        """Tokenize all texts; one that leaves no place for the new tokens is refused, never cut."""
        items = [self._tokens(value) for value in values]
        for item in items:
            if not item:
                raise ValueError("the text has no tokens to go on from")
            if self._places is not None and len(item) + self._reserved > self._places:
                raise ValueError(
                    f"the text has {len(item)} tokens, and with {self._reserved} new ones that is more "
                    f"than the {self._places} that the model takes: shorten it, or lower --max-new-tokens"
                )
        return items

    def _tokens(self, value: Any) -> list[int]:
        if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            text = self._tokenizer.apply_chat_template(value, add_generation_prompt=True, tokenize=False)
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not isinstance(value, str):
            raise TypeError(f"expected text or chat messages, got {value!r:.80}; choose it with --column")
        return list(self._tokenizer(self._prompt + value)["input_ids"])


@dataclasses.dataclass(frozen=True)
class WithPositions:
    """Adds the positions of the records to what is collated."""

    collate: Any

    def __call__(self, items: Sequence[Any], positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """Collate the items of one batch."""
        return {**self.collate(items), "positions": torch.tensor(positions)}


class Texts:
    """Makes texts of the new tokens.

    Args:
        tokenizer: of the folder.
        config: of generation.
        stop: texts that end a text and are left out of it.
    """

    def __init__(self, tokenizer: Any, config: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        ends = _ends(config)
        # Without a token that ends a text, none is padding either.
        self._ends = {config.pad_token_id, *ends} if ends else set()
        self._most = config.max_new_tokens
        self._stop = stop

    def __call__(self, output: Mapping[str, torch.Tensor], items: Sequence[Any]) -> dict[str, list[Any]]:
        """Return `text`, `num_tokens` without the mark of the end, and `finish_reason`: stop or length."""
        rows = [self._row(row) for row in output["tokens"].tolist()]
        return {name: [row[name] for row in rows] for name in ("text", "num_tokens", "finish_reason")}

    def _row(self, row: list[int]) -> dict[str, Any]:
        length = next((place for place, token in enumerate(row) if token in self._ends), len(row))
        text = self._tokenizer.decode(row[:length], skip_special_tokens=True)
        reason = "length" if length == self._most else "stop"
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            text, reason = text[: min(places)], "stop"
        return {"text": text, "num_tokens": length, "finish_reason": reason}


def _ends(config: Any) -> list[int]:
    """Return the tokens that end a text."""
    ends = config.eos_token_id
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
