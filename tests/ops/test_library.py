"""An operation is called as the function it is where nobody asks PyTorch about it, and through PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dig.ops.library import Operation, operation


@pytest.fixture(scope="module")
def doubled() -> Operation[..., Tensor]:
    """Twice a tensor, as an operation that notes what it was called with."""

    def function(x: Tensor) -> Tensor:
        seen.append(type(x))
        return x * 2

    seen: list[type] = []
    made = operation("dig_tests::doubled")(_typed(function))
    made.register_fake(torch.empty_like)
    made.register_autograd(lambda ctx, dy: dy * 2, setup_context=lambda ctx, inputs, output: None)
    return made


def _typed(function: object) -> object:
    """torch.library reads types from the annotations, which are strings here."""
    function.__annotations__ = {"x": Tensor, "return": Tensor}  # type: ignore[attr-defined]
    return function


@pytest.fixture
def through_torch(doubled: Operation[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry for each call that PyTorch was told of."""
    calls: list[str] = []
    registered = doubled.registered

    def told(*arguments: object) -> object:
        calls.append("told")
        return registered(*arguments)

    monkeypatch.setattr(doubled, "registered", told)
    return calls


def test_without_gradients_nobody_is_told(doubled: Operation[..., Tensor], through_torch: list[str]) -> None:
    x = torch.ones(3)
    with torch.no_grad():
        assert torch.equal(doubled(x), torch.full((3,), 2.0))
        assert torch.equal(doubled(nn.Parameter(x)), torch.full((3,), 2.0))
    assert not through_torch


def test_with_gradients_torch_is_told_and_differentiates(
    doubled: Operation[..., Tensor], through_torch: list[str]
) -> None:
    x = torch.ones(3, requires_grad=True)
    doubled(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 3
    assert through_torch == ["told"]


def test_recorded_autograd_is_told_and_torch_is_not(doubled: Operation[..., Tensor], through_torch: list[str]) -> None:
    x = torch.ones(3, requires_grad=True)
    doubled.recorded(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 3
    with torch.no_grad():
        assert not doubled.recorded(x).requires_grad
    assert not through_torch
    with FlopCounterMode(display=False):
        doubled.recorded(x).sum().backward()
    with torch.no_grad():
        assert torch.vmap(doubled.recorded)(torch.ones(2, 3)).tolist() == [[2.0] * 3] * 2
    assert through_torch == ["told"] * 2
    assert x.grad.tolist() == [4.0] * 3


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    ("mode", "made"),
    [
        (lambda: FlopCounterMode(display=False), torch.ones),
        (FakeTensorMode, torch.ones),
        (nullcontext, lambda n: torch.ones(n).as_subclass(_Subclass)),
    ],
)
def test_modes_and_other_tensors_are_told(
    doubled: Operation[..., Tensor],
    through_torch: list[str],
    mode: type[AbstractContextManager[object]],
    made: object,
) -> None:
    with torch.no_grad(), mode():
        doubled(made(3))  # type: ignore[operator]
    assert through_torch == ["told"]


def test_a_transform_is_told(doubled: Operation[..., Tensor], through_torch: list[str]) -> None:
    with torch.no_grad():
        assert torch.vmap(doubled)(torch.ones(2, 3)).tolist() == [[2.0] * 3] * 2
    assert through_torch == ["told"]


def test_a_trace_holds_the_operation(doubled: Operation[..., Tensor], through_torch: list[str]) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: doubled(x), torch.ones(3))  # noqa: PLW0108 - it asks for a name
    assert through_torch[0] == "told"
    assert "dig_tests::doubled" in str(traced.graph)
