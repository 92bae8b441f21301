"""Gradients, and gradients of gradients, through each verb and through whole passes."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import asyncdp
from asyncdp._autograd import Broadcast, Gather, ReduceAdd, Scatter
from asyncdp.errors import ReduceAddDtypeError, ReduceAddSizeError

from .conftest import Passes
from .models import Fn, rows

CPU = torch.device("cpu")


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a tensor that requires a gradient."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def scatter(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.sin() for each in asyncdp.scatter(x, "cpu*2"))


def scatter_one_used(x: Tensor) -> Tensor:
    return asyncdp.scatter(x, "cpu*3", dim=1)[1].sin()


def gather(x: Tensor, y: Tensor) -> Tensor:
    return asyncdp.gather([x.sin(), y], "cpu", dim=1)


def gather_scalars(x: Tensor, y: Tensor) -> Tensor:
    return asyncdp.gather([x.sum(), y.prod()], "cpu")


def replicate_and_apply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run a linear layer with these parameters, on three lanes, by the verbs."""
    module = nn.Linear(2, 2).double()
    module._parameters.update(weight=weight, bias=bias)  # the very tensors that gradcheck varies
    replicas = asyncdp.replicate(module, "cpu*3")
    shards = asyncdp.scatter(x, "cpu*3")
    outputs = asyncio.run(asyncdp.parallel_apply(replicas, shards, devices="cpu*3"))
    return asyncdp.gather(outputs, "cpu").tanh()


@pytest.mark.filterwarnings("ignore:Was asked to gather")
@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (scatter, (leaf(3, 2),)),
        (scatter, (leaf(3, 2, dtype=torch.complex128),)),
        (scatter_one_used, (leaf(2, 3),)),
        (gather, (leaf(2, 1), leaf(2, 2))),
        (gather_scalars, (leaf(2), leaf(2))),
        (replicate_and_apply, (leaf(4, 2), leaf(2, 2), leaf(2))),
    ],
)
def test_first_and_second_derivatives(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    """Contract 14: numerical and analytical gradients agree, to the second order."""
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, False)])
def test_dual_functions_skip_what_is_not_used(used: tuple[bool, bool]) -> None:
    """Broadcast sums over the copies that were used, and gives None where none was."""
    x, other = leaf(2), leaf(3)
    copies = Broadcast.apply([CPU, CPU], True, x, other)
    total = other.sum() * 0 + sum(
        (copies[2 * lane].sum() for lane in range(2) if used[lane]), torch.zeros(())
    )
    total.backward()
    assert (None if x.grad is None else x.grad.tolist()) == ([float(sum(used))] * 2 if any(used) else None)


def test_gather_to_nowhere() -> None:
    """A gathered output that takes no part in the loss gives no gradient to its shards."""
    x, y = leaf(2), leaf(2)
    Gather.apply(CPU, 0, x, y)
    shards = Scatter.apply(0, [1, 1], x)
    (shards[1] * 3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 3]
    assert y.grad is None


def test_reduce_add_belongs_to_backward() -> None:
    """Contract 5: in a forward that would need a gradient, ReduceAdd says where it belongs."""
    words = "ReduceAdd can only be used during the backward pass of data parallel."
    with pytest.raises(RuntimeError) as caught:
        ReduceAdd.apply(CPU, leaf(2), leaf(2))
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("other", "error", "words"),
    [
        (
            torch.zeros(3),
            ReduceAddSizeError,
            "All inputs of ReduceAdd must have the same size, but got [3] and [2]",
        ),
        (
            torch.zeros(2).double(),
            ReduceAddDtypeError,
            "All inputs of ReduceAdd must have the same dtype, but got torch.float64 and torch.float32",
        ),
    ],
)
def test_reduce_add_checks_its_inputs(other: Tensor, error: type[ValueError], words: str) -> None:
    """Contract 6: unlike sizes and dtypes are a ValueError with both values in it."""
    with pytest.raises(error) as caught:
        ReduceAdd.apply(CPU, torch.zeros(2), other)
    assert str(caught.value).startswith(words)
    assert isinstance(caught.value, ValueError)


def penalty(output: Tensor, x: Tensor, parameters: list[Tensor]) -> None:
    """Run the gradient of a sum of squared gradients."""
    grads = torch.autograd.grad(output.square().sum(), [x, *parameters], create_graph=True)
    torch.stack([grad.square().sum() for grad in grads]).sum().backward()


def test_create_graph_through_a_pass(dp: Passes) -> None:
    """Contract 14: a gradient penalty, with its second backward, equals the plain module's."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    twin = copy.deepcopy(module)

    x = rows(3)().requires_grad_()
    y = x.detach().clone().requires_grad_()
    penalty(dp(module, x, lanes=3), x, list(module.parameters()))
    penalty(twin(y), y, list(twin.parameters()))
    torch.testing.assert_close(x.grad, y.grad)
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_retain_graph(dp: Passes) -> None:
    """A graph that is kept can be run backward again, and gives the same gradient again."""
    module = nn.Linear(3, 1).double()
    loss = dp(module, rows(3)()).square().sum()
    loss.backward(retain_graph=True)
    once = module.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(module.weight.grad, 2 * once)


def test_gradients_accumulate_over_passes_under_way_together(dp: Passes) -> None:
    """The graphs of two passes live beside each other, whichever is run backward first."""
    module = nn.Linear(3, 1).double()
    twin = copy.deepcopy(module)
    x, y = rows(3)(), rows(3)()

    async def both() -> list[Tensor]:
        return await asyncio.gather(dp.begin(module, x), dp.begin(module, y))

    first, second = dp.runner.run(both())
    second.square().sum().backward()
    first.pow(3).sum().backward()
    twin(y).square().sum().backward()
    twin(x).pow(3).sum().backward()
    torch.testing.assert_close(module.weight.grad, twin.weight.grad)


def test_step_between_forward_and_backward_is_told(dp: Passes) -> None:
    """Parameters changed in place after a forward make its backward fail, as in plain torch."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    loss = dp(module, torch.randn(4, 3)).sum()
    with torch.no_grad():
        module[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unused_parameter_keeps_no_gradient(dp: Passes) -> None:
    """Contract 5: no lane used it, so `grad` stays None; one lane used it, so it has that gradient."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.used(x) + (m.by_one.weight if x[0, 0] == 1 else 0)

    module = Fn(
        forward, used=nn.Linear(1, 1), by_one=nn.Linear(1, 1), unused=nn.Linear(1, 1), frozen=nn.Linear(1, 1)
    )
    module.frozen.requires_grad_(False)
    dp(module, torch.tensor([[0.0], [0.0], [1.0], [1.0]])).sum().backward()
    assert [module.unused.weight.grad, module.frozen.weight.grad, module.by_one.bias.grad] == [None] * 3
    assert module.by_one.weight.grad == 2
    assert module.used.bias.grad == 4


def test_gradient_hooks_see_the_sum(dp: Passes) -> None:
    """Hooks on a parameter run once, with the gradient of the whole batch."""
    module = nn.Linear(1, 1, bias=False)
    seen: list[Any] = []
    module.weight.register_hook(lambda grad: seen.append(grad.item()))
    module.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.item()))
    dp(module, torch.ones(4, 1)).sum().backward()
    assert seen == [4.0, 4.0]


def test_sparse_gradients(dp: Passes) -> None:
    """Contract 15: an embedding's gradient comes sparse, summed over lanes."""
    module, twin = nn.Embedding(10, 3, sparse=True), nn.Embedding(10, 3, sparse=True)
    twin.load_state_dict(module.state_dict())
    x = torch.tensor([1, 2, 2, 9])
    dp(module, x).square().sum().backward()
    twin(x).square().sum().backward()
    assert module.weight.grad.is_sparse
    torch.testing.assert_close(module.weight.grad.coalesce(), twin.weight.grad.coalesce())


def test_memory_format_of_gradients(dp: Passes) -> None:
    """Contract 16: a channels_last weight has a channels_last gradient."""
    module = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(4, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    y = dp(module, x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    for tensor in (module.weight, x):
        assert tensor.grad.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("create_graph", [False, True])
def test_half_sums_accumulate_in_float32(dp: Passes, dtype: torch.dtype, create_graph: bool) -> None:
    """Contract 16: terms that half precision would lose one by one are all in the sum."""
    lanes = 5
    module = Fn(lambda m, x: x * m.w)
    module.w = nn.Parameter(torch.ones(1, dtype=dtype))
    big, small = (2048.0, 1.0) if dtype is torch.float16 else (256.0, 1.0)
    x = torch.tensor([big] + [small] * (lanes - 1), dtype=dtype)
    (grad,) = torch.autograd.grad(dp(module, x, lanes=lanes).sum(), [module.w], create_graph=create_graph)
    assert grad.dtype == dtype
    assert grad.item() == big + (lanes - 1) * small


def test_three_steps_give_the_serial_weights(dp: Passes) -> None:
    """Three SGD steps of a convolution and a linear layer end where the serial run ends."""
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    twin = copy.deepcopy(module)
    optimizers = [torch.optim.SGD(each.parameters(), 0.05, momentum=0.9) for each in (module, twin)]
    for _ in range(3):
        x, target = torch.randn(10, 1, 8, 8), torch.randint(5, (10,))
        outputs = [dp(module, x, lanes=3), twin(x)]
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(output, target).backward()
            optimizer.step()
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("num_lanes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_lanes_need_no_aliases(num_lanes: int, dtype: torch.dtype) -> None:
    """Two CPU lanes have the module's own parameters, more have aliases; gradients are sums in any case."""
    module = nn.Linear(3, 1).to(dtype)
    frozen = nn.Linear(1, 1).requires_grad_(False).to(dtype)
    model = nn.Sequential(module, frozen)
    seen: set[bool] = set()
    module.register_forward_hook(lambda each, args, output: seen.add(each.weight.is_leaf) or None)
    x = torch.randn(6, 3, dtype=dtype)

    async def run() -> None:
        async with asyncdp.DataParallel(model, f"cpu*{num_lanes}", num_lanes="all") as engine:
            await engine(x)  # the first pass gives lanes copies, to find out who writes into parameters
            for _ in range(2):
                seen.clear()
                (await engine(x)).sum().backward()

    asyncio.run(run())
    assert seen == {num_lanes == 2}
    expected = torch.autograd.grad(model.float()(x.float()).sum(), module.weight)[0] * 2
    torch.testing.assert_close(module.weight.grad.float(), expected, rtol=0.02, atol=0.02)
