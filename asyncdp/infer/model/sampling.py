"""How the next token is chosen: the most probable, or drawn so that a record's draws are its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .folders import import_transformers
from .task_options import TaskOptions

Warpers = Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]


class Choice:
    """Leaves one token for each text: a logits processor of transformers, which then takes the best one.

    Args:
        warpers: processors of transformers that change the probabilities; None takes the best token.
        draws: numbers from 0 to 1 [batch, most tokens], the first for the first new token.
    """

    def __init__(self, warpers: Warpers | None, draws: torch.Tensor) -> None:
        self._warpers = warpers
        self._draws = draws
        self.start = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [batch, tokens] whose largest is the chosen one."""
        if not self.start:
            self.start = input_ids.shape[1]
        if self._warpers is None:
            return scores
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        return _drawn(scores, self._draws[:, input_ids.shape[1] - self.start])


def _drawn(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    sums = scores.double().softmax(1).cumsum(1)
    # Scaled by the sum, 1 but for rounding, so that no draw is beyond the last possible token.
    places = torch.searchsorted(sums, draws.unsqueeze(1) * sums[:, -1:], right=True)
    return torch.full_like(scores, float("-inf")).scatter_(1, places.clamp(max=scores.shape[1] - 1), 0.0)


def draws_of(positions: Sequence[int], count: int, seed: int) -> torch.Tensor:
    """Return numbers from 0 to 1 [records, count] that depend on seed and position of each record alone."""
    # A generator by counter: its numbers are the same on every machine.
    keys = (np.array([seed % 2**64, position], dtype=np.uint64) for position in positions)
    rows = [np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys]
    return torch.from_numpy(np.stack(rows))


def make_warpers(config: Any, options: TaskOptions) -> Warpers | None:
    """Return what changes the probabilities before a draw; None where the best token is taken.

    Args:
        config: what the folder says of generation.
        options: what counts before it.
    """
    samples = bool(config.do_sample)
    if options.temperature is not None:
        samples = options.temperature > 0
    elif options.top_k is not None or options.top_p is not None:
        samples = True
    if not samples:
        return None
    transformers = import_transformers()
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    values = {name: getattr(config, name, None) for name in _WARPERS}
    values |= {name: value for name, value in given.items() if value is not None}
    return [
        getattr(transformers, kind)(values[name])
        for name, (kind, neutral) in _WARPERS.items()
        if values[name] is not None and values[name] != neutral
    ]


def without_sampling(config: Any) -> Any:
    """Return settings of generation that take the best token, where `Choice` has drawn one already."""
    config = copy.deepcopy(config)
    config.do_sample = False
    for name in _WARPERS:
        setattr(config, name, 0.0 if name.endswith("cutoff") else None)
    return config


# In the order of transformers: the class, and the value that changes nothing.
_WARPERS = {
    "temperature": ("TemperatureLogitsWarper", 1.0),
    "top_h": ("TopHLogitsWarper", None),
    "top_k": ("TopKLogitsWarper", 0),
    "top_p": ("TopPLogitsWarper", 1.0),
    "min_p": ("MinPLogitsWarper", None),
    "typical_p": ("TypicalLogitsWarper", 1.0),
    "epsilon_cutoff": ("EpsilonLogitsWarper", 0.0),
    "eta_cutoff": ("EtaLogitsWarper", 0.0),
}


class StopTexts:
    """Ends a text that holds one of some texts: a stopping criterion of transformers.

    Args:
        tokenizer: turns tokens into text.
        stop: the texts.
        choice: knows where the new tokens begin.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], choice: Choice) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._choice = choice
        # A token is a byte at least, but for marks that are no text.
        self._tail = max(len(text.encode()) for text in stop) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return which of [batch, length] hold one of the texts in their last tokens."""
        start = max(self._choice.start, input_ids.shape[1] - self._tail)
        texts = self._tokenizer.batch_decode(input_ids[:, start:])
        found = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(found, device=input_ids.device)
