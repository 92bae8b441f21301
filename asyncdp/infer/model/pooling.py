"""From the states of a text's tokens to one vector, as the folders of sentence-transformers say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_LEAST = 1e-9


class Pooling(nn.Module):
    """Puts the states of the tokens of each text together; several modes are put side by side.

    Args:
        modes: some of `POOLING_MODES`.
        skipped: how many of the first tokens are left out: those of a prompt.
    """

    def __init__(self, modes: Sequence[str] = ("mean",), skipped: int = 0) -> None:
        super().__init__()
        self.modes = tuple(modes)
        self.skipped = skipped

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pool.

        Args:
            states: [batch, length, width].
            mask: [batch, length], 0 at padding, which comes last; None where there is none.

        Returns:
            [batch, number of modes times width].
        """
        mask = torch.ones_like(states[..., 0], dtype=torch.long) if mask is None else mask
        if self.skipped:
            mask = mask.clone()
            mask[:, : self.skipped] = 0
        return torch.cat([POOLING_MODES[mode](states, mask) for mode in self.modes], dim=-1)


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _weighted(states, mask, mask.sum(1))


def _mean_by_root(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _weighted(states, mask, mask.sum(1).clamp(min=_LEAST).sqrt())


def _weighted_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return _weighted(states, weights, weights.sum(1))


def _weighted(states: torch.Tensor, weights: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(states.dtype, torch.float32)
    total = (states.to(wide) * weights.unsqueeze(-1)).sum(1)
    return (total / over.to(wide).clamp(min=_LEAST).unsqueeze(-1)).to(states.dtype)


def _max(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)


def _first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _pick(states, mask.int().argmax(1))


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    places = torch.arange(mask.shape[1], device=mask.device)
    return _pick(states * mask.unsqueeze(-1), (mask * places).argmax(1))


def _pick(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states), device=states.device), places]


POOLING_MODES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}

_FLAGS = {
    f"pooling_mode_{name}": mode
    for name, mode in zip(
        (
            "cls_token",
            "max_tokens",
            "mean_tokens",
            "mean_sqrt_len_tokens",
            "weightedmean_tokens",
            "lasttoken",
        ),
        POOLING_MODES,
        strict=True,
    )
}


def modes_of(config: dict[str, object]) -> list[str]:
    """Return the modes that the settings of a pooling name, also as the flags of older versions."""
    modes: Any = config.get("pooling_mode")
    if modes is None:
        flags = {name: is_set for name, is_set in config.items() if name.startswith("pooling_mode_")}
        unknown = [name for name, is_set in flags.items() if is_set and name not in _FLAGS]
        modes = [mode for flag, mode in _FLAGS.items() if flags.get(flag)] + unknown
        modes = modes or (f"none of {len(flags)} modes" if flags else "mean")
    return [modes] if isinstance(modes, str) else [str(mode) for mode in modes]


class Projection(nn.Module):
    """A linear layer with an activation, whose input may be added to its output.

    Args:
        in_width: entries of a vector before.
        out_width: entries after.
        bias: whether a vector is added.
        activation: applied last.
        residual: whether the input is added, projected where the widths differ.
    """

    def __init__(
        self, in_width: int, out_width: int, *, bias: bool, activation: nn.Module, residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_width, out_width, bias=bias)
        self.activation_function = activation
        if residual and in_width != out_width:
            self.residual = nn.Linear(in_width, out_width, bias=False)
        self._adds_input = residual

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Project [batch, in_width] to [batch, out_width]."""
        projected: torch.Tensor = self.activation_function(self.linear(vectors))
        if not self._adds_input:
            return projected
        return projected + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class LayerNorm(nn.Module):
    """Layer normalization under the name that its weights have in a folder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Normalize each of [batch, width]."""
        normalized: torch.Tensor = self.norm(vectors)
        return normalized


class Normalize(nn.Module):
    """Scales vectors to length one."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Scale each of [batch, width]."""
        return nn.functional.normalize(vectors, dim=-1)
