"""Texts of different length run back to back, so that nothing is computed for padding."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_ATTENTION = "asyncdp_packed"

# Encoders whose tokens affect each other in attention only, and that take the position of every token.
_MODEL_TYPES = ("bert", "roberta", "xlm-roberta")

_Run = tuple[int, int]  # how many texts, and of how many tokens each


class Packing:
    """Runs an encoder of transformers over the tokens of a batch, and not over its padding.

    The tokens of all texts form one row. Layers that treat each token by itself see that row; attention
    takes the texts of one length at a time.

    Args:
        encoder: one that `find_packing` has tried. The attention it gets does as before with a padded batch.
    """

    def __init__(self, encoder: Any) -> None:
        self._pad: int | None = None if encoder.config.model_type == "bert" else encoder.config.pad_token_id
        _register_attention()
        encoder.set_attn_implementation(_ATTENTION)

    def states(
        self, encoder: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, **others: torch.Tensor
    ) -> torch.Tensor:
        """Compute the states of every text's tokens.

        Args:
            encoder: the one this was made for, or a copy of it.
            input_ids: [batch, length], padding last.
            mask: [batch, length], 0 at padding, else 1.
            others: further arguments with one entry per token, [batch, length].

        Returns:
            [batch, length, width], 0 at padding.
        """
        lengths, order = mask.sum(1).sort()
        is_token = mask[order].bool()
        runs = [(len(list(alike)), length) for length, alike in itertools.groupby(lengths.tolist()) if length]
        given = {"input_ids": input_ids, "position_ids": self._positions(input_ids), **others}
        rows = {name: each[order][is_token].unsqueeze(0) for name, each in given.items()}
        found = encoder(**rows, runs=runs).last_hidden_state[0]
        states: torch.Tensor = found.new_zeros(*mask.shape, found.shape[-1])
        states[is_token] = found
        return states[order.argsort()]

    def _positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self._pad is None:
            return torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        # RoBERTa counts from its padding token, and does not count such tokens, which a text may hold too.
        counted = (input_ids != self._pad).long()
        return counted.cumsum(1) * counted + self._pad


class PackedEncoder(nn.Module):
    """An encoder that computes nothing for padding on the CPU, and stands in its place in a larger model.

    Args:
        encoder: of transformers.
        packing: what `find_packing` found for it.
    """

    def __init__(self, encoder: Any, packing: Packing) -> None:
        super().__init__()
        self.encoder = encoder
        self._packing = packing

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Return what the encoder returns, with zeros as the states of padding."""
        others = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        # A GPU would be given many small kernels; a compiler wants one shape whatever the lengths are.
        if attention_mask is None or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **others, **settings)
        states = self._packing.states(self.encoder, input_ids, attention_mask, **others)
        outputs: Any = importlib.import_module("transformers.modeling_outputs")
        pooler = getattr(self.encoder, "pooler", None)
        return outputs.BaseModelOutputWithPooling(states, None if pooler is None else pooler(states))


def packed(encoder: Any) -> Any:
    """Return an encoder that skips padding, or the encoder itself where that gives other states."""
    packing = find_packing(encoder)
    return encoder if packing is None else PackedEncoder(encoder, packing)


def with_packed_base(model: Any) -> Any:
    """Return a model of transformers whose encoder skips padding below its head, where that is right."""
    encoder = getattr(model, model.base_model_prefix, None)
    if encoder is not None:
        setattr(model, model.base_model_prefix, packed(encoder))
    return model


@torch.inference_mode()
def find_packing(encoder: Any) -> Packing | None:
    """Return how to run an encoder of transformers without padding; None if that gives other states."""
    if encoder.config.model_type not in _MODEL_TYPES:
        return None
    if not hasattr(importlib.import_module("transformers"), "AttentionMaskInterface"):
        return None
    # Tried, since not every version of transformers passes the further arguments on to attention.
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    input_ids = torch.arange(mask.numel()).view_as(mask) % encoder.config.vocab_size
    expected = torch.zeros(*mask.shape, encoder.config.hidden_size)
    for states, ids, real in zip(expected, input_ids, mask.bool(), strict=True):
        states[real] = encoder(input_ids=ids[real].unsqueeze(0)).last_hidden_state[0]
    usual = encoder.config._attn_implementation
    packing = Packing(encoder)
    # An encoder that takes no further arguments raises.
    with contextlib.suppress(TypeError):
        found = packing.states(encoder, input_ids, mask)
        if torch.allclose(found.float(), expected, rtol=0, atol=torch.finfo(found.dtype).eps ** 0.5):
            return packing
    encoder.set_attn_implementation(usual)
    return None


def _register_attention() -> None:
    interfaces: Any = importlib.import_module("transformers")
    usual = interfaces.AttentionInterface()["sdpa"]

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        runs: Sequence[_Run] | None = None,
        **settings: Any,
    ) -> Any:
        # All of [batch, heads, length, width of a head]; in the result the length comes before the heads.
        if runs is None:
            return usual(module, query, key, value, attention_mask, **settings)
        rows = [each[0].transpose(0, 1) for each in (query, key, value)]
        attended = [
            usual(module, *(part.transpose(1, 2) for part in parts), None, **settings)[0].flatten(0, 1)
            for parts in zip(*(_split(row, runs) for row in rows), strict=True)
        ]
        return torch.cat(attended).unsqueeze(0), None

    interfaces.AttentionInterface.register(_ATTENTION, attend)
    interfaces.AttentionMaskInterface.register(_ATTENTION, interfaces.AttentionMaskInterface()["sdpa"])


def _split(row: torch.Tensor, runs: Sequence[_Run]) -> list[torch.Tensor]:
    """Cut [tokens, ...] into [texts, length, ...], one for every run."""
    parts = row.split([number * length for number, length in runs])
    return [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]
