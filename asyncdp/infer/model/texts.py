"""Texts, and pairs of texts, to batches of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

Item = Any
"""A list of token ids, or a dict of such lists with one entry per token each."""


class Tokenize:
    """Texts -> items, cut to `max_length`; pairs of texts too where they are wanted.

    Args:
        tokenizer: of the folder.
        max_length: tokens that a text is cut to.
        arguments: names of what the model takes.
        prompt: stands before every text.
        pairs: "never", "allowed" or "always".
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        arguments: Collection[str] = ("input_ids",),
        prompt: str = "",
        pairs: str = "never",
    ) -> None:
        self.tokenizer = tokenizer
        self._max_length = max_length
        self._prompt = prompt
        self._pairs = pairs
        self._token_types = "token_type_ids" in arguments and "token_type_ids" in tokenizer.model_input_names
        # The first call changes the tokenizer's settings, which fails while another thread uses it.
        probe = self._encode([("a", "b")] if pairs == "always" else ["a"])
        # Zeros are what models take where they get nothing.
        self._token_types = self._token_types and (pairs != "never" or any(probe["token_type_ids"][0]))

    def __call__(self, values: Sequence[Any]) -> list[Item]:
        """Tokenize all texts at once."""
        texts = [self._text(value) for value in values]
        if len({isinstance(text, tuple) for text in texts}) > 1:
            raise ValueError("some records are texts, others pairs of texts")
        encoded = self._encode(texts)
        if not self._token_types:
            ids: list[Item] = encoded["input_ids"]
            return ids
        names = ("input_ids", "token_type_ids")
        return [dict(zip(names, item, strict=True)) for item in zip(*map(encoded.get, names), strict=True)]

    def _text(self, value: Any) -> str | tuple[str, str]:
        if isinstance(value, str) and self._pairs != "always":
            return self._prompt + value
        if self._pairs != "never":
            parts = list(value.values()) if isinstance(value, Mapping) else value
            if isinstance(parts, list | tuple) and len(parts) == 2 and all(isinstance(p, str) for p in parts):
                return self._prompt + parts[0], parts[1]
        wanted, columns = _WANTED[self._pairs]
        raise TypeError(f"expected {wanted}, got {value!r:.80}; choose {columns}")

    def _encode(self, texts: Sequence[Any]) -> Any:
        pairs = bool(texts) and isinstance(texts[0], tuple)
        parts = [list(part) for part in zip(*texts, strict=True)] if pairs else [list(texts)]
        return self.tokenizer(
            *parts,
            truncation=True,
            max_length=self._max_length,
            return_attention_mask=False,
            return_token_type_ids=self._token_types,
        )


_WANTED = {
    "never": ("text", "the text with --column"),
    "allowed": ("text or a pair of texts", "the text with --column, or a pair with two of them"),
    "always": ("a pair of texts", "both with --column query --column text"),
}


@dataclasses.dataclass(frozen=True)
class PadTokens:
    """Items -> keyword arguments of a model.

    Attributes:
        pad: id of the padding token.
        token_type: of padding.
        left: whether padding comes first. It is then the text's own first token: a setting such as a penalty
            for repeated tokens must not find other tokens in a text because of its neighbours.
    """

    pad: int
    token_type: int = 0
    left: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> PadTokens:
        """Pad as a tokenizer does."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return cls(pad, tokenizer.pad_token_type_id)

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Pad to the longest; a batch of one length needs no mask and runs faster without."""
        columns = _columns(items)
        lengths = torch.tensor([len(ids) for ids in columns["input_ids"]])
        longest = int(lengths.max())
        batch = {
            name: torch.tensor([self._padded(name, values, longest) for values in column])
            for name, column in columns.items()
        }
        if not bool((lengths == longest).all()):
            is_token = torch.arange(longest) < lengths.unsqueeze(1)
            batch["attention_mask"] = (is_token.flip(1) if self.left else is_token).long()
        return batch

    def _padded(self, name: str, values: list[int], length: int) -> list[int]:
        missing = length - len(values)
        if self.left:
            return values[:1] * missing + values
        return values + [self.pad if name == "input_ids" else self.token_type] * missing


def _columns(items: Sequence[Item]) -> dict[str, list[list[int]]]:
    if isinstance(items[0], list):
        return {"input_ids": list(items)}
    return {name: [item[name] for item in items] for name in items[0]}


def num_tokens(item: Item) -> int:
    """Return how many tokens an item has."""
    return len(item if isinstance(item, list) else item["input_ids"])
