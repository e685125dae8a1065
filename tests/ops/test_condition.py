"""The condition of a few images against the modules that it stands for, in fp64; interpreted where there is no GPU."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dig.layers import LabelEmbedder, TimestepEmbedder
from dig.ops.condition import condition
from dig.ops.tiles import sm90
from tests.helpers import LARGE, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(4, 2), (72, 6), (384, 256)] + ([(1152, 256)] if LARGE else [])
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.usefixtures("poison")


def embedders(width: int, frequencies: int, dtype: torch.dtype) -> tuple[TimestepEmbedder, LabelEmbedder]:
    times, labels = TimestepEmbedder(width, frequencies), LabelEmbedder(5, width).eval()
    return times.to(DEVICE, dtype), labels.to(DEVICE, dtype)


def fused(times: TimestepEmbedder, labels: LabelEmbedder, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    first, _, second = times.mlp
    with torch.no_grad():
        return condition(t, y, first.weight, first.bias, second.weight, second.bias, labels.embedding_table.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "frequencies", "images"),
    [
        (width, frequencies, images)
        for width, frequencies in SIZES
        for images in (1, 3, sm90.PASSES.condition_images)
        if LARGE or width < 384 or images == 3
    ],
)
def test_it_is_that_of_the_embedders(width: int, frequencies: int, images: int, dtype: torch.dtype) -> None:
    times, labels = embedders(width, frequencies, dtype)
    t = torch.rand(images, device=DEVICE) * 1000
    t[0] = 999.0
    y = torch.arange(images, device=DEVICE) % 6
    found = fused(times, labels, t, y)
    with torch.no_grad():
        exact = deepcopy(times).double()(t) + deepcopy(labels).double()(y)
    for actual, expected in zip(found, (exact, F.silu(exact)), strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < TOLERANCE[dtype]


def test_whole_timesteps_and_any_strides() -> None:
    times, labels = embedders(16, 8, torch.float32)
    t, y = torch.tensor([[0, 7], [999, 3]], device=DEVICE)[:, 0], torch.tensor([[5, 0], [0, 0]], device=DEVICE)[:, 0]
    for strided, plain in zip(fused(times, labels, t, y), fused(times, labels, t.float(), y.clone()), strict=True):
        assert torch.equal(strided, plain)


@pytest.mark.parametrize("label", [-1, 6, 2**40])
def test_a_label_that_there_is_not_gives_nan_and_nothing_else_does(label: int) -> None:
    times, labels = embedders(16, 8, torch.float32)
    both = fused(times, labels, torch.tensor([1.0, 2.0], device=DEVICE), torch.tensor([label, 5], device=DEVICE))
    for found in both:
        assert found[0].isnan().all()
        assert found[1].isfinite().all()


def test_the_operation_is_registered_rightly() -> None:
    times, labels = embedders(16, 8, torch.float32)
    first, _, second = times.mlp
    arguments = [torch.rand(2), torch.zeros(2, dtype=torch.int64), first.weight, first.bias, second.weight, second.bias]
    table = labels.embedding_table.weight
    inputs = tuple(tensor.detach().to(DEVICE) for tensor in (*arguments, table))
    torch.library.opcheck(condition.registered, inputs, test_utils=("test_schema", "test_faketensor"))
