"""The reference recurrence: chunked equals step by step, and bad arguments are named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dig.ops.gla import gated_linear_attention
from tests.helpers import relative_error


def inputs(T: int, K: int, V: int, dtype: torch.dtype, logits: Tensor | None = None) -> list[Tensor]:
    q, k = torch.randn(2, 2, T, 3, K, dtype=dtype).unbind(0)
    v = torch.randn(2, T, 3, V, dtype=dtype)
    logits = torch.randn(2, T, 3, K, dtype=dtype) if logits is None else logits
    return [x.requires_grad_() for x in (q, k, v, (F.logsigmoid(logits) / 16).detach())]


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize(("K", "V"), [(32, 64), (36, 72), (5, 3)])
def test_chunked_equals_step_by_step(T: int, K: int, V: int) -> None:
    arguments = inputs(T, K, V, torch.float64)
    outputs, gradients = [], []
    weight = torch.randn(2, T, 3, V, dtype=torch.float64)
    for implementation in ("recurrent", "reference"):
        output = gated_linear_attention(*arguments, implementation=implementation)
        outputs.append(output)
        gradients.append(torch.autograd.grad((output * weight).sum(), arguments))
    assert relative_error(outputs[1], outputs[0]) < 1e-9
    for actual, expected, name in zip(gradients[1], gradients[0], ("q", "k", "v", "log_decay"), strict=True):
        # With one token the state is empty before it, so its decay has no effect at all.
        assert relative_error(actual, expected) < 1e-9 or (T == 1 and name == "log_decay"), name


def test_extreme_gates_are_finite_and_right() -> None:
    logits = torch.randn(2, 100, 3, 8, dtype=torch.float64)
    logits[torch.rand_like(logits) < 0.3] = -1000
    logits[torch.rand_like(logits) < 0.3] = 1000
    wide = inputs(100, 8, 6, torch.float64, logits)
    expected = gated_linear_attention(*wide, implementation="recurrent")
    narrow = [x.detach().float().requires_grad_() for x in wide]
    actual = gated_linear_attention(*narrow, implementation="reference")
    assert relative_error(actual, expected) < 1e-4
    actual.sum().backward()
    assert all(x.grad.isfinite().all() for x in narrow)


def test_long_memory() -> None:
    wide = inputs(3000, 4, 4, torch.float64, torch.full((2, 3000, 3, 4), 12.0, dtype=torch.float64))
    expected = gated_linear_attention(*wide, implementation="recurrent")
    actual = gated_linear_attention(*[x.float() for x in wide], implementation="reference")
    assert relative_error(actual, expected) < 1e-5


def test_output_keeps_the_values_dtype() -> None:
    q, k, v, log_decay = (x.detach().bfloat16() for x in inputs(20, 8, 8, torch.float32))
    output = gated_linear_attention(q, k, v, log_decay.float(), implementation="reference")
    expected = gated_linear_attention(*(x.double() for x in (q, k, v, log_decay)), implementation="recurrent")
    assert output.dtype == torch.bfloat16
    assert relative_error(output, expected) < 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "magic"}, "implementation must be one of"),
        ({"q": torch.randn(2, 3, 4)}, r"q must be \(B, T, H, K\)"),
        ({"k": torch.randn(1, 4, 2, 9)}, "k must have q's shape"),
        ({"log_decay": torch.randn(1, 5, 2, 8)}, "log_decay must have q's shape"),
        ({"v": torch.randn(1, 4, 3, 6)}, r"v must be \(B, T, H, V\)"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {name: torch.randn(1, 4, 2, 8) for name in ("q", "k", "v", "log_decay")}
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**{"implementation": "reference", **arguments, **change})


def test_fla_on_the_cpu_is_refused() -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device"):
        gated_linear_attention(x, x, x, -x.abs(), implementation="fla")
