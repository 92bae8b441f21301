"""Models and functions that the tests name as `models_for_tests:name`."""

from __future__ import annotations

import os
import time

import torch
from torch import nn


class Sums(nn.Module):
    """x [batch, 3] -> the sum of each row, and the row doubled."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"total": x.sum(1) * self.scale, "double": x * 2}


class Picky(Sums):
    """Refuses a batch that holds a row starting with 13."""

    def forward(self, x):
        if bool((x[:, 0] == 13).any()):
            raise ValueError("thirteen brings bad luck")
        return super().forward(x)


class Slow(Sums):
    """Takes its time."""

    def forward(self, x):
        time.sleep(0.2)
        return super().forward(x)


class Hungry(Sums):
    """Runs out of memory on more than four rows."""

    def forward(self, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return super().forward(x)


class Ragged(nn.Module):
    """Gives one row too few."""

    def forward(self, x):
        return x[1:]


class Shapeless(nn.Module):
    """Its output's width depends on the first row."""

    def forward(self, x):
        return x.new_zeros(len(x), int(x[0, 0]) + 1)


class Lengths(nn.Module):
    """Texts -> their lengths."""

    def forward(self, texts):
        return torch.tensor([len(text) for text in texts])


class GradTeller(nn.Module):
    """Tells whether it runs in inference mode."""

    def forward(self, x):
        return torch.full((len(x),), torch.is_inference_mode_enabled())


class Means(nn.Module):
    """Images [batch, 3, h, w] -> the mean of each channel."""

    def forward(self, x):
        return x.mean((2, 3))


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def random_linear():
    return nn.Linear(3, 2)


def broken_factory():
    raise KeyError("no such setting")


def no_module():
    return 5


def shout(text):
    return text.upper()


def refuse_b(text):
    if text == "b":
        raise ValueError("no b please")
    return text


def only_total(output):
    return [{"label": f"sum {value:.0f}"} for value in output["total"]]


def double_batch(items):
    return {"x": torch.stack([torch.tensor(item["x"]) for item in items]) * 2}


NOT_CALLABLE = 3


class Echo(nn.Module):
    """Records {"record": dict} -> these dicts."""

    def forward(self, records):
        return records


def records_of(items):
    return ([item["record"] for item in items],)


def as_text(value):
    return str(value)


def x_of(record):
    """The vector of a record with other columns."""
    return record["x"]


def loudness(sound):
    """Rate, length and loudest sample of a sound."""
    return torch.tensor([sound["sampling_rate"], len(sound["array"]), abs(sound["array"]).max()])


class Deadly(Sums):
    """Ends its process over a row starting with 4, as a crash in native code does."""

    def forward(self, x):
        if bool((x[:, 0] == 4).any()):
            os.abort()
        return super().forward(x)
