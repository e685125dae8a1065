"""Gradients whose strides DistributedDataParallel compares with its buckets'."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dig.training.parallel import wrap

pytestmark = pytest.mark.usefixtures("ranks")
SAYS = "Grad strides do not match bucket view strides"


class Multiplied(torch.autograd.Function):
    """The weight's sum; its gradient has the strides that are asked for."""

    @staticmethod
    def forward(context: Any, weight: Tensor, strides: tuple[int, ...]) -> Tensor:
        context.strides = strides
        return weight.sum()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return torch.empty_strided((8, 1, 3, 3), context.strides).fill_(float(gradient)), None


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 1, 3, 3))

    def forward(self, strides: tuple[int, ...]) -> Tensor:
        return Multiplied.apply(self.weight, strides)  # type: ignore[no-any-return]


@pytest.fixture
def always() -> Iterator[None]:
    """What PyTorch says once a process it says each time."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("always")
def test_a_stride_of_one_element_is_no_difference() -> None:
    found = []
    for filtered in (True, False):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            network = wrap(Depthwise(), "ddp").network
            if not filtered:
                warnings.simplefilter("always")  # Before the filter that wrapping has set.
            network((9, 1, 3, 1)).backward()
        found.append([str(one.message) for one in said if SAYS in str(one.message)])
        assert torch.equal(network.module.weight.grad, torch.ones(8, 1, 3, 3))
    hushed, told = found
    assert hushed == []
    assert len(told) == 1  # Else there is nothing to be silent about any more.


def message(sizes: str, ours: str, theirs: str) -> str:
    return (
        f"{SAYS}. This may indicate grad was not created according to the gradient layout contract.\n"
        f"grad.sizes() = {sizes}, strides() = {ours}\nbucket_view.sizes() = {sizes}, strides() = {theirs} "
        "(Triggered internally at reducer.cpp:335.)"
    )


@pytest.mark.parametrize(
    ("sizes", "ours", "theirs"),
    [
        ("[8, 1, 3, 3]", "[9, 1, 1, 3]", "[9, 9, 3, 1]"),
        ("[8, 1, 3, 3]", "[1, 1, 24, 8]", "[9, 9, 3, 1]"),
        ("[8, 2, 3, 3]", "[18, 1, 6, 2]", "[18, 9, 3, 1]"),
        ("[8, 4]", "[1, 8]", "[4, 1]"),
    ],
)
def test_other_strides_are_told(sizes: str, ours: str, theirs: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wrap(Depthwise(), "ddp")
        warnings.warn(message("[8, 1, 3, 3]", "[9, 1, 3, 1]", "[9, 9, 3, 1]"), UserWarning, stacklevel=1)
        told = message(sizes, ours, theirs)
        warnings.warn(told, UserWarning, stacklevel=1)
    assert [str(one.message) for one in said if SAYS in str(one.message)] == [told]
