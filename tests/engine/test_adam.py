"""AdamW with one step count per group, against torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megamm.engine.adam import GroupStepAdamW


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(5, 3), (7,), (2, 2, 2)]]


def groups_of(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "lr": 0.03, "weight_decay": 0.2}, {"params": params[1:], "lr": 0.01}]


def give_gradients(step: int, *sides: list[torch.nn.Parameter]) -> None:
    """The same gradients on both sides; the last parameter has none in every other step."""
    generator = torch.Generator().manual_seed(step)
    for index, pair in enumerate(zip(*sides, strict=True)):
        gradient = torch.randn(pair[0].shape, generator=generator) * 10.0 ** (step % 3 - 1)
        for parameter in pair:
            parameter.grad = None if index == 2 and step == 0 else gradient.clone()


@pytest.mark.parametrize(("decoupled", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_equals_torch(decoupled: bool, reference: Any) -> None:
    settings: dict[str, Any] = dict(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05)
    mine, theirs = parameters()[:2], parameters()[:2]
    ours = GroupStepAdamW(groups_of(mine), adam_w_mode=decoupled, **settings)
    torchs = reference(groups_of(theirs), **settings)
    start = [p.detach().clone() for p in mine]
    for step in range(1, 8):
        for optimizer in (ours, torchs):  # a schedule writes the rate into the groups
            optimizer.param_groups[0]["lr"] = 0.03 / step
        give_gradients(step, mine, theirs)
        ours.step()
        torchs.step()
        for a, b, before in zip(mine, theirs, start, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
            assert not torch.equal(a, before)
    assert [group["step"] for group in ours.param_groups] == [7, 7]


def test_an_empty_group_counts_steps() -> None:
    """Its rank holds no shard of the group's parameters, but saves the group."""
    (parameter,) = parameters()[:1]
    optimizer = GroupStepAdamW([{"params": [parameter]}, {"params": []}])
    for step in range(1, 4):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert [group["step"] for group in optimizer.param_groups] == [step, step]
    nothing = GroupStepAdamW([{"params": []}])
    nothing.step()
    assert nothing.param_groups[0]["step"] == 1 and not nothing.state


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters()
    optimizer = GroupStepAdamW(params, lr=0.1, weight_decay=0.5)
    before = params[2].detach().clone()
    give_gradients(0, params)
    optimizer.step()
    assert torch.equal(params[2], before) and params[2] not in optimizer.state
    give_gradients(1, params)
    optimizer.step()
    assert not torch.equal(params[2], before)


def test_going_on_from_a_state_dict() -> None:
    one, other = parameters(), parameters()
    first = GroupStepAdamW(groups_of(one), weight_decay=0.1)
    for step in range(1, 4):
        give_gradients(step, one)
        first.step()
    second = GroupStepAdamW(groups_of(other), weight_decay=0.1)
    assert second.state_dict()["state"] == {}  # before the first step too
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch would share the tensors
    with torch.no_grad():
        for target, source in zip(other, one, strict=True):
            target.copy_(source)
    for step in range(4, 7):
        give_gradients(step, one, other)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert second.param_groups[0]["step"] == 6
