"""Which optimizer steps are taken by fused kernels, and that they come to the same."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.nn import functional

from asyncdp._training.fused import fused

from .helpers import batch, distance, engine, mlp, same, serial_step

Make = Callable[[Any], optim.Optimizer]

MAKERS: dict[str, Make] = {
    "sgd": lambda params: optim.SGD(params, 0.1, momentum=0.9),
    "adam": lambda params: optim.Adam(params, 0.1),
    "adamw": lambda params: optim.AdamW(params, 0.1),
    "adagrad": lambda params: optim.Adagrad(params, 0.1),
}


class Own(optim.SGD):
    """An optimizer of a user's own."""


def parameters(*, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 3), (7,), ())]


def give_gradients(params: list[nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for each in params:
        each.grad = torch.randn(each.shape, generator=generator).to(each.dtype)


def stepped(make: Make, params: list[nn.Parameter]) -> optim.Optimizer:
    """An optimizer with a step behind it, and the gradients for its next."""
    optimizer = make(params)
    give_gradients(params)
    optimizer.step()
    return optimizer


def choices(optimizer: optim.Optimizer) -> list[Any]:
    """What each group says within the block."""
    with fused(optimizer):
        return [group.get("fused") for group in optimizer.param_groups]


sgd_options = st.fixed_dictionaries(
    {
        "lr": st.floats(0.001, 0.5),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "maximize": st.booleans(),
    }
)
adam_options = st.fixed_dictionaries(
    {
        "lr": st.floats(0.001, 0.1),
        "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9)]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)
adagrad_options = st.fixed_dictionaries(
    {
        "lr": st.floats(0.001, 0.5),
        "lr_decay": st.sampled_from([0.0, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
    }
)
optimizers = st.one_of(
    st.tuples(st.just(optim.SGD), sgd_options),
    st.tuples(st.just(optim.Adam), adam_options),
    st.tuples(st.just(optim.AdamW), adam_options),
    st.tuples(st.just(optim.Adagrad), adagrad_options),
)
shapes = st.lists(st.lists(st.integers(0, 20), max_size=3), min_size=1, max_size=4)


@given(optimizers, shapes, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 4))
def test_same_weights_and_state(
    kind: tuple[Any, dict[str, Any]], sizes: list[list[int]], dtype: torch.dtype, left_out: int
) -> None:
    """Any options and shapes, one without a gradient among them, come to what torch comes to unfused."""
    make, options = kind
    own = [
        nn.Parameter(torch.linspace(-1, 1, torch.Size(size).numel(), dtype=dtype).view(size))
        for size in sizes
    ]
    other = copy.deepcopy(own)
    optimizer, plain = make(own, **options), make(other, **options)
    for turn in range(4):
        for params in (own, other):
            give_gradients(params, turn)
            if left_out < len(params):
                params[left_out].grad = None
        if turn > 0 and (left_out > 0 or len(own) > 1):
            assert choices(optimizer) == [True]
        with fused(optimizer):
            optimizer.step()
        plain.step()
    within = 1e-5 if dtype == torch.float32 else 1e-13
    assert same(list(own), list(other), within)
    assert same(optimizer.state_dict()["state"], plain.state_dict()["state"], within)
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_not_the_first_step(name: str) -> None:
    """A step that makes what the optimizer keeps is torch's own; those after it are fused."""
    params = parameters()
    optimizer = MAKERS[name](params)
    give_gradients(params)
    assert choices(optimizer) == [None]
    optimizer.step()
    assert choices(optimizer) == [True]
    assert [group["fused"] for group in optimizer.param_groups] == [None]


@pytest.mark.parametrize("choice", [{"foreach": False}, {"foreach": True}, {"fused": False}, {"fused": True}])
def test_a_choice_is_kept(choice: dict[str, bool]) -> None:
    """Whoever has said how to step gets that, and finds it said still."""
    optimizer = stepped(lambda params: optim.Adam(params, **choice), parameters())
    before = optimizer.state_dict()["param_groups"]
    assert choices(optimizer) == [choice.get("fused")]
    assert optimizer.state_dict()["param_groups"] == before


def transposed_parameter(params: list[nn.Parameter], _: optim.Optimizer) -> None:
    params[0].data = params[0].data.t().contiguous().t()


def transposed_gradient(params: list[nn.Parameter], _: optim.Optimizer) -> None:
    params[0].grad = torch.randn(3, 5).t()


def transposed_state(params: list[nn.Parameter], optimizer: optim.Optimizer) -> None:
    state = optimizer.state[params[0]]
    for name, each in state.items():
        if each.dim() == 2:
            state[name] = each.t().contiguous().t()


def sparse_gradient(params: list[nn.Parameter], _: optim.Optimizer) -> None:
    params[0].grad = torch.randn(5, 3).to_sparse()


def new_parameter(params: list[nn.Parameter], optimizer: optim.Optimizer) -> None:
    fresh = parameters()
    give_gradients(fresh)
    optimizer.param_groups[0]["params"] += fresh


def tensor_rate(_: list[nn.Parameter], optimizer: optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)


def differentiable(_: list[nn.Parameter], optimizer: optim.Optimizer) -> None:
    optimizer.param_groups[0]["differentiable"] = True


def hook(_: list[nn.Parameter], optimizer: optim.Optimizer) -> None:
    optimizer.register_step_post_hook(lambda optimizer, *_: torch.save(optimizer.state_dict(), io.BytesIO()))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "change",
    [
        transposed_parameter,
        transposed_gradient,
        transposed_state,
        sparse_gradient,
        new_parameter,
        tensor_rate,
        differentiable,
        hook,
    ],
)
def test_not_where_kernels_would_go_wrong(name: str, change: Callable[..., None]) -> None:
    """Torch steps by itself if tensors lie in memory otherwise or are missing, or a hook looks on."""
    params = parameters()
    optimizer = stepped(MAKERS[name], params)
    assert choices(optimizer) == [True]
    change(params, optimizer)
    assert choices(optimizer) == [None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_not_in_other_dtypes(dtype: torch.dtype) -> None:
    """Half types would be computed in another precision, and complex ones have no kernel."""
    assert choices(stepped(MAKERS["adam"], parameters(dtype=dtype))) == [None]


@pytest.mark.parametrize(
    "make",
    [
        lambda params: Own(params, 0.1),
        lambda params: optim.RMSprop(params, 0.1),
    ],
)
def test_not_for_other_optimizers(make: Make) -> None:
    """A subclass may mean something else by its options, and not every optimizer has a fused kernel."""
    assert choices(stepped(make, parameters())) == [None]


def test_each_group_by_itself() -> None:
    """A group that cannot be fused does not keep others from it."""
    params = parameters()
    groups = [{"params": params[:1], "foreach": False}, {"params": params[1:], "name": "rest"}]
    optimizer = optim.SGD(groups, 0.1, momentum=0.9)
    give_gradients(params)
    optimizer.step()
    assert choices(optimizer) == [None, True]


def test_an_error_leaves_no_trace() -> None:
    """After a step that raises the groups say what they said before."""
    optimizer = stepped(MAKERS["sgd"], parameters())
    with pytest.raises(ZeroDivisionError), fused(optimizer):
        _ = 1 / 0
    assert [group["fused"] for group in optimizer.param_groups] == [None]


def test_counts_steps_in_the_default_dtype() -> None:
    """Adam counts its steps in float64 where that is the default; fused steps count on."""
    torch.set_default_dtype(torch.float64)
    try:
        params = parameters(dtype=torch.float64)
        optimizer = stepped(MAKERS["adam"], params)
        assert choices(optimizer) == [True]
        with fused(optimizer):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    steps = [optimizer.state[each]["step"] for each in params]
    assert [(each.item(), each.dtype) for each in steps] == [(2.0, torch.float64)] * 3


@pytest.mark.anyio
@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_a_training_step_is_fused(num_lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train_step` takes every step but the first by the fused kernel, and comes to what torch comes to."""
    torch.manual_seed(0)
    module = mlp()
    serial = copy.deepcopy(module)
    optimizer, serial_optimizer = MAKERS["sgd"](module.parameters()), MAKERS["sgd"](serial.parameters())
    kernel, sizes = torch._fused_sgd_, []

    def counted(params: list[Tensor], *args: Any, **kwargs: Any) -> None:
        sizes.append(len(params))
        kernel(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_sgd_", counted)
    async with engine(module, num_lanes) as one:
        for _ in range(5):
            x, y = batch(9)
            await one.train_step(x, y, functional.cross_entropy, optimizer)
            serial_step(serial, serial_optimizer, x, y, functional.cross_entropy)
    assert sizes == [6] * 4
    assert distance(module, serial) < 1e-12
