"""Every module of torch's own test database gives, split over lanes, what it gives called shard by shard."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import importlib.util
import os
import random
import sys
import types
import unittest
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import asyncdp

# Torch's database says no names before it is imported, which takes seconds: too long for whoever only
# collects tests. A test below finds what this list lacks.
NAMES = """
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
AvgPool1d AvgPool2d AvgPool3d BCELoss BCEWithLogitsLoss BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU
CTCLoss CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d
Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineEmbeddingLoss CrossEntropyLoss ELU Embedding
FractionalMaxPool2d FractionalMaxPool3d GELU GLU GRU GRUCell GaussianNLLLoss GroupNorm Hardshrink Hardswish
Hardtanh HingeEmbeddingLoss HuberLoss InstanceNorm1d InstanceNorm2d InstanceNorm3d KLDivLoss L1Loss LPPool1d
LPPool2d LPPool3d LSTM LSTMCell LayerNorm LazyConv1d LazyConv2d LazyConv3d LazyConvTranspose1d
LazyConvTranspose2d LazyConvTranspose3d LeakyReLU Linear LinearCrossEntropyLoss LocalResponseNorm LogSigmoid
LogSoftmax MSELoss MarginRankingLoss MaxPool1d MaxPool2d MaxPool3d Mish MultiLabelMarginLoss
MultiLabelSoftMarginLoss MultiMarginLoss MultiheadAttention NLLLoss PReLU PoissonNLLLoss RMSNorm RNN RNNCell
ReLU ReLU6 ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d
SELU SiLU Sigmoid SmoothL1Loss SoftMarginLoss Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh
Tanhshrink Threshold Transformer TransformerDecoderLayer TransformerEncoder TransformerEncoderLayer ZeroPad1d
ZeroPad2d ZeroPad3d
""".split()  # noqa: SIM905  a name a line would be longer than all the rest

NOT_COMPARED = {"CTCLoss": "its arguments have their rows along different dimensions"}
"""Modules of which no setup can be compared, and why."""

CELLS = {"RNNCell", "GRUCell", "LSTMCell"}
SEQUENCES = {"RNN", "GRU", "LSTM", "MultiheadAttention"}
"""Of these two the database has single rows only; the tests make batches of them."""
BATCH_SECOND = SEQUENCES | {name for name in NAMES if name.startswith("Transformer")}
"""Modules whose batch may lie along dimension 1."""

MAX_SETUPS = 4
"""Of a module in one mode, drawn at random; losses alone have hundreds."""

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of old arguments and of gathered scalars


class Refusal(Exception):
    """The module cannot be called on shards, or not with these inputs."""

    def __init__(self, expected: type[Exception]) -> None:
        super().__init__(expected)
        self.expected = expected


class Setup(NamedTuple):
    """A module and the arguments of a call."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copied_inputs(self) -> Setup:
        """Return the same module with inputs that nobody else has."""
        return self._replace(args=copied(self.args), kwargs=copied(self.kwargs))


class Pass(NamedTuple):
    """What a pass gave and left behind."""

    output: Any
    inputs: Any
    module_gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


@pytest.fixture(scope="module")
def database() -> dict[str, Any]:
    """Import the database and put back what its import changes for the whole process."""
    profile = hypothesis.settings.get_current_profile_name()
    environment, frozen = dict(os.environ), torch.backends.flags_frozen()
    if importlib.util.find_spec("expecttest") is None:  # torch's tests need it, its database does not
        sys.modules["expecttest"] = types.ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
    from torch.testing._internal.common_modules import module_db

    hypothesis.settings.load_profile(profile)
    os.environ.clear()
    os.environ.update(environment)
    if not frozen:
        setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
    return {info.name.removeprefix("nn."): info for info in module_db}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all passes."""
    with asyncio.Runner() as runner:
        yield runner


def test_no_module_is_missing(database: dict[str, Any]) -> None:
    """The tests below cover the whole database."""
    assert not database.keys() - set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_pass_equals_module_called_by_hand(
    database: dict[str, Any], runner: asyncio.Runner, name: str
) -> None:
    """Outputs, gradients, buffers and written inputs are those of the module called on each shard."""
    if name not in database:
        pytest.skip(f"torch {torch.__version__} has no {name} in its database")
    num_compared = 0
    for training in (True, False) if database[name].train_and_eval_differ else (True,):
        for setup in setups_of(name, database[name], training):
            for dim in (0, 1) if name in BATCH_SECOND else (0,):
                num_compared += compare(runner, setup, dim)
    assert (num_compared == 0) == (name in NOT_COMPARED), f"{num_compared} results were compared"


def setups_of(name: str, info: Any, training: bool) -> list[Setup]:
    """Return modules of one entry of the database, with the inputs of each."""
    torch.manual_seed(0)
    found = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    setups = []
    for each in random.Random(name).sample(found, min(len(found), MAX_SETUPS)):
        made = each.constructor_input
        module = info.module_cls(*made.args, **made.kwargs).double().train(training)
        inputs = each.forward_input.args, each.forward_input.kwargs
        if info.is_lazy:
            module(*copied(inputs[0]), **copied(inputs[1]))
        setups.append(Setup(module, *inputs))
        if name in CELLS | SEQUENCES:
            setups.append(Setup(module, *as_batch(module, *inputs)))
    return setups


def as_batch(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Make batches of the arguments, which are single rows; a recurrent module's state has them second."""
    batch_first = getattr(module, "batch_first", True)

    def repeated(leaf: Any, dim: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        rows = torch.stack([(leaf.detach() * scale).to(leaf.dtype) for scale in range(5)], dim)
        return rows.requires_grad_(leaf.requires_grad)

    def batched(argument: Any, position: int) -> Any:
        dim = 1 if not batch_first or (position == 1 and isinstance(module, nn.RNNBase)) else 0
        return mapped(lambda leaf: repeated(leaf, dim), argument)

    args = tuple(batched(argument, position) for position, argument in enumerate(args))
    # One mask for all rows would be split like the rows, so only the one that has rows is kept.
    padding = kwargs.get("key_padding_mask")
    return args, {} if padding is None else {"key_padding_mask": repeated(padding, 0)}


def compare(runner: asyncio.Runner, setup: Setup, dim: int) -> bool:
    """Compare a pass without and one with gradients; return whether there were results to compare."""
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            by_hand, ours = setup.copied_inputs(), setup.copied_inputs()
            try:
                expected = pass_by_hand(by_hand, dim)
            except Refusal as refusal:
                with pytest.raises(refusal.expected):
                    pass_over_lanes(runner, ours, dim)
                return False
            found = pass_over_lanes(runner, ours, dim)
            torch.testing.assert_close(found, expected, equal_nan=True)
    return True


def pass_by_hand(setup: Setup, dim: int) -> Pass:
    """Call a copy of the module on each of two shards; gradients are summed, buffers are the first's."""
    shards = split((setup.args, setup.kwargs), dim)
    copies = [copy.deepcopy(setup.module) for _ in shards]
    try:
        outputs = [each(*args, **kwargs) for each, (args, kwargs) in zip(copies, shards, strict=True)]
    except Exception as error:
        raise Refusal(type(error)) from error
    has_rows = any(
        isinstance(leaf, Tensor) and leaf.dim() > dim for leaf in leaves_of((setup.args, setup.kwargs))
    )
    output = concatenate(outputs, dim) if has_rows else outputs[0]
    run_backward(output)
    columns = zip(*(each.named_parameters() for each in copies), strict=True)
    gradients = {column[0][0]: sum_of([parameter.grad for _, parameter in column]) for column in columns}
    return Pass(output, left_behind(setup), gradients, dict(copies[0].named_buffers()))


def pass_over_lanes(runner: asyncio.Runner, setup: Setup, dim: int) -> Pass:
    """Run the module on two lanes."""
    called = asyncdp.data_parallel(setup.module, setup.args, "cpu*2", dim=dim, module_kwargs=setup.kwargs)
    output = runner.run(called, context=contextvars.copy_context())
    run_backward(output)
    gradients = {name: parameter.grad for name, parameter in setup.module.named_parameters()}
    setup.module.zero_grad()
    return Pass(output, left_behind(setup), gradients, dict(setup.module.named_buffers()))


def split(tree: Any, dim: int) -> list[Any]:
    """Split all tensors of nested inputs in two along a dimension they share; in one if none has it."""
    leaves = leaves_of(tree)
    if any(isinstance(leaf, PackedSequence) for leaf in leaves):
        raise Refusal(asyncdp.errors.UnsplittableError)
    lengths = {leaf.shape[dim] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > dim}
    if len(lengths) > 1:
        raise Refusal(asyncdp.errors.LengthMismatchError)
    num_shards = max(1, min(2, *lengths)) if lengths else 1

    def shard(leaf: Any, position: int) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() <= dim:
            return leaf
        return leaf.tensor_split(num_shards, dim)[position]

    return [mapped(lambda leaf: shard(leaf, position), tree) for position in range(num_shards)]  # noqa: B023


def concatenate(outputs: list[Any], dim: int) -> Any:
    """Put the outputs of the shards together; single numbers become a vector."""
    first = outputs[0]
    if isinstance(first, (tuple, list)):
        return type(first)(concatenate(list(column), dim) for column in zip(*outputs, strict=True))
    if not isinstance(first, Tensor):
        return first
    if first.dim() == 0:
        return torch.stack(outputs)
    try:
        return torch.cat(outputs, dim)
    except (RuntimeError, IndexError):
        raise Refusal(asyncdp.errors.GatherError) from None


def run_backward(output: Any) -> None:
    """Begin at every number of the output with another gradient."""
    tensors = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if tensors:
        torch.autograd.backward(
            tensors, [torch.linspace(1, 2, each.numel()).to(each).view_as(each) for each in tensors]
        )


def left_behind(setup: Setup) -> list[Any]:
    """Return values and gradients of all inputs."""
    leaves = leaves_of((setup.args, setup.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return [(tensor.detach(), tensor.grad) for tensor in tensors]


def sum_of(gradients: list[Tensor | None]) -> Tensor | None:
    """Add the gradients of those copies that have one."""
    found = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(found).sum(0) if found else None


def copied(tree: Any) -> Any:
    """Copy every tensor as a leaf."""
    return mapped(
        lambda leaf: (
            leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
        ),
        tree,
    )


def mapped(function: Any, tree: Any) -> Any:
    """Apply a function to every leaf of tuples, lists and mappings."""
    if isinstance(tree, (tuple, list)) and not isinstance(tree, PackedSequence):
        return type(tree)(mapped(function, each) for each in tree)
    if isinstance(tree, Mapping):
        return {key: mapped(function, each) for key, each in tree.items()}
    return function(tree)


def leaves_of(tree: Any) -> list[Any]:
    """Return every leaf of tuples, lists and mappings."""
    leaves: list[Any] = []
    mapped(leaves.append, tree)
    return leaves
