"""Training steps over processes: those of a single device with all rows, and all or nothing everywhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import checks
from .processes import Processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two processes, for all tests of this file."""
    processes = Processes(2, tmp_path_factory.mktemp("pair"))
    yield processes
    processes.close()


def serial(sizes: list[int], reduction: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Take the steps of `checks.take_steps` in plain torch, with all rows."""
    module = checks.net()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for step in range(3):
        inputs, targets = checks.batch(step, sum(sizes))
        loss = functional.cross_entropy(module(inputs), targets, reduction=reduction)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, module.state_dict()


@pytest.mark.parametrize("lanes", ["cpu", "cpu*2"])
@pytest.mark.parametrize("sizes", [[5, 3], [0, 8], [1, 1], [0, 0]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_are_those_of_one_device(pair: Processes, lanes: str, sizes: list[int], reduction: str) -> None:
    """Any number of rows in each process gives the step of one device with all rows; all end up bit-equal."""
    (losses, state), (other_losses, other_state) = pair.run(checks.take_steps, lanes, sizes, reduction)
    expected_losses, expected = serial(sizes, reduction)
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(other_losses, losses, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(other_state, state, rtol=0, atol=0)


def whole(module: checks.Everything, outside: Tensor) -> Tensor:
    ids = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 9, 9])
    outputs = module(ids) * module.temperature * outside
    return functional.cross_entropy(outputs, torch.arange(10) % 3)


@pytest.mark.parametrize("lanes", ["cpu", "cpu*2"])
def test_every_kind_of_parameter_and_step(pair: Processes, lanes: str) -> None:
    """Steps with all options, of tied, frozen, sparse, unused and outside tensors are those of one device."""
    (reduced, state, outside, norms, scale), other = pair.run(checks.take_every_kind, lanes)
    module = checks.Everything()
    expected_outside = nn.Parameter(torch.ones((), dtype=torch.float64))
    dense = [each for name, each in module.named_parameters() if name != "table.weight"]
    optimizer = torch.optim.SGD([*dense, module.table.weight, expected_outside], 0.1)
    whole(module, expected_outside).backward()
    for name, each in module.named_parameters():
        if each.grad is None:
            assert reduced[name] is None, name
        else:
            is_sparse, gradient = reduced[name]
            assert each.grad.is_sparse == is_sparse, name
            torch.testing.assert_close(gradient, each.grad.to_dense(), rtol=0, atol=1e-12)
    expected_outside.grad = None
    # The scaled step unscales what it finds: the gradients of the first step too, and those under no_sync are
    # scaled as its own are not.
    total = whole(module, expected_outside) + 4.0 * whole(module, expected_outside)
    total.backward()
    for each in optimizer.param_groups[0]["params"]:
        if each.grad is not None:
            each.grad /= 4.0
    expected_norm = nn.utils.clip_grad_norm_(dense, 0.1)
    optimizer.step()
    torch.testing.assert_close(norms, [expected_norm], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, module.state_dict(), rtol=0, atol=1e-12)
    torch.testing.assert_close(outside, expected_outside.detach(), rtol=0, atol=1e-12)
    assert scale == 4.0
    torch.testing.assert_close(other[1], state, rtol=0, atol=0)


@pytest.mark.parametrize(("lanes", "norm"), [("cpu", False), ("cpu*2", True)])
def test_failures_fail_everywhere_and_change_nothing(pair: Processes, lanes: str, norm: bool) -> None:
    """Whatever process 1 does wrong is its own error there and names it elsewhere; all go on in step."""
    (found, state), (own, other_state) = pair.run(checks.fail_in_every_way, lanes, norm)
    assert [*found] == [*own] == [*checks.TROUBLES]
    assert all(same for *_, same in [*found.values(), *own.values()])
    assert {(name, rank) for name, rank, *_ in found.values()} == {("PeerStepError", 1)}
    own_names = {trouble: name for trouble, (name, *_) in own.items()}
    assert own_names == {
        "forward": "ValueError",
        "interrupt": "KeyboardInterrupt",
        "cancelled": "TimeoutError",
        "lengths": "LengthMismatchError",
        "no_sync": "PeerStepError",
        "loss": "LossNotScalarError",
        "before_step": "ZeroDivisionError",
        "sum": "PeerStepError",
        "max": "LossReductionError",
        "optimizer": "PeerStepError",
        "learning rate": "PeerStepError",
        "tensor learning rate": "PeerStepError",
        "scale": "PeerStepError",
    }
    assert "ValueError: bad record" in found["forward"][2]
    assert "lr=0.5" in found["learning rate"][2]
    assert "lr=0.5" in found["tensor learning rate"][2]
    assert "a scaler of scale 8.0 where process 0 has a scaler of scale 4.0" in found["scale"][2]
    assert 'it has loss_reduction="sum" where process 0 has loss_reduction="mean"' in found["sum"][2]
    assert checks.are_equal(state, other_state)


@pytest.mark.parametrize(
    ("counts", "ending", "num_steps", "error"),
    [
        ([3, 3], "", 3, (None, None)),
        ([1, 3], "", 3, (None, None)),
        ([3, 0], "", 3, (None, None)),
        ([4, 2], "fails", 2, ("PeerStepError", "OSError")),
        ([5, 5], "left", 2, ("PeerStepError", None)),
    ],
)
def test_streams_end_together(
    pair: Processes, counts: list[int], ending: str, num_steps: int, error: tuple[Any, Any]
) -> None:
    """A process whose batches have ended joins without rows; one that fails or leaves ends all streams."""
    (found, raised, state), (other, other_raised, other_state) = pair.run(
        checks.train_streams, counts, ending
    )
    assert len(found) == len(other) == num_steps
    assert [(loss, rate) for _, _, loss, rate in found] == [(loss, rate) for _, _, loss, rate in other]
    assert [rows for _, rows, _, _ in found[: counts[0]]] == [7] * min(counts[0], num_steps)
    assert all(rows == 0 for _, rows, _, _ in found[counts[0] :])
    assert (raised and raised[0], other_raised and other_raised[0]) == error
    assert checks.are_equal(state, other_state)


def test_rates_are_compared_as_steps_begin(pair: Processes) -> None:
    """Processes may queue steps at different times: what an earlier step changes is no difference."""
    (rates, state), (other_rates, other_state) = pair.run(checks.queue_ahead_or_not)
    assert rates == other_rates == [0.5, 0.25, 0.125, 0.0625]
    assert checks.are_equal(state, other_state)


def test_a_rejoin_gives_the_scale(pair: Processes) -> None:
    """A scaler gets the scale of the process whose state goes to all, and serves at once."""
    (scale, state), (other_scale, other_state) = pair.run(checks.rejoin_with_scalers)
    assert scale == other_scale == 8.0
    assert checks.are_equal(state, other_state)


def test_a_late_peer_is_waited_for_off_the_loop(pair: Processes) -> None:
    """A caller whose peer does not come can give up; the peer is told so when it comes, and both go on."""
    (found, state), (other, other_state) = pair.run(checks.wait_for_late_peer)
    assert found == [True, True]
    assert other == [(0, True)]
    assert checks.are_equal(state, other_state)


def test_what_cannot_train_together_is_refused(pair: Processes) -> None:
    """A wrong group, and the first difference between modules, are named on every process; a mesh serves."""
    for found in pair.run(checks.refuse_constructions):
        assert len(found) == 4
        assert "'gloo'" in found[0]
        assert "one dimension" in found[1]
        assert "does not contain this process" in found[2]
        assert "weight [2, 4] float32" in found[3]
        assert "weight [2, 3] float32" in found[3]


def test_a_step_that_is_half_done_stops_all_until_they_rejoin(pair: Processes) -> None:
    """After an optimizer that raises on one process all refuse to go on, and a rejoin mends it."""
    (names, num_done, state), (other_names, _, other_state) = pair.run(checks.fail_in_optimizer)
    assert names == ["fine", "PeerStepError"]
    assert other_names == ["ZeroDivisionError", "PeerStepError"]
    assert num_done == 2
    assert checks.are_equal(state, other_state)


def test_a_process_exits_while_it_waits(tmp_path: Path) -> None:
    """One whose peer did not come, and dies as this one ends, ends quietly and with success."""
    command = [sys.executable, "-m", "tests.distributed.exits", str(tmp_path / "store")]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_nothing_is_left(pair: Processes) -> None:
    """Engines that were closed leave no thread."""
    assert pair.run(checks.names_of_threads) == [[], []]


@pytest.mark.parametrize("where", ["loss", "before_step"])
def test_a_dead_process_is_survived(tmp_path: Any, where: str) -> None:
    """The others roll back at once, still answer, and train on together after a rejoin."""
    processes = Processes(3, tmp_path)
    try:
        answers = processes.run(checks.lose_a_process, str(tmp_path / "second"), where, lost=2)
    finally:
        processes.close()
    for names, same, num_done, _ in answers:
        assert names == [True, True]
        assert same
        assert num_done == 1
    assert checks.are_equal(answers[0][3], answers[1][3])
