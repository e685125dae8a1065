"""A family's operation against its truth at the shape that is timed: every output and gradient, stretch by stretch.

The whole tensor's error has a bound that a scaling of 5% is beyond. The error of each stretch of tokens has another, so
that a wrong tail, which is next to nothing in the whole, is found too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bench.cases.case import Case
from bench.parity.error import ParityError, relative_error
from bench.parity.inputs import SEED
from dig.layers import Backbone
from dig.operation import Operation
from dig.registry import parse_name

BOUND = {"bf16": 0.04, "fp32": 5e-3}
"""Of a whole tensor: kernels in bf16 are off by 0.3 to 2%, and an error of 5% must be seen."""
STRETCH_BOUND = {"bf16": 0.12, "fp32": 1.5e-2}
"""Of a stretch of tokens, whose own gradient may be small."""
STRETCHES = 64
VANISHES = 1e-5
"""Root mean square of a truth that is nothing but rounding."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The largest error of a whole tensor, and what it may be."""

    error: float
    bound: float


def check_operation(case: Case, model: Backbone) -> Found | None:
    """Compare the operation of a case's model with its truth, at the case's tokens, heads, batch and dtype.

    Args:
        case: What was timed: its mode decides whether gradients are compared.
        model: Of that case.

    Returns:
        None where the family names no operation, or the truth does not fit in memory.

    Raises:
        ParityError: An output or a gradient differs, as a whole or in a stretch of tokens.
    """
    family, _, _ = parse_name(case.model)
    if family.operation is None:
        return None
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    torch.manual_seed(SEED)
    try:
        operation = family.operation(model, case.batch, dtype)
        return compare(operation, case.dtype, gradients=case.mode == "train", what=case.describe())
    except torch.OutOfMemoryError:
        return None


def compare(operation: Operation, dtype: str, *, gradients: bool, what: str) -> Found:
    """Compare an operation with its truth.

    Args:
        operation: Its inputs.
        dtype: ``bf16`` or ``fp32``: which bounds.
        gradients: Whether those of the inputs are compared too.
        what: Of whom the message speaks.

    Raises:
        ParityError: They differ.
    """
    actual = _results(operation, gradients, truth=False)
    expected = _results(operation, gradients, truth=True)
    worst = 0.0
    for name, right in expected.items():
        ours = actual[name].float()
        error = _error(ours, right)
        worst = max(worst, error)
        if not error <= BOUND[dtype]:
            raise ParityError(
                f"{what}: at this very shape the {name} of its operation is off by {error:.2g}; {BOUND[dtype]:.2g} is "
                "allowed"
            )
        if name != "output" and name.removeprefix("gradient of ") not in operation.per_token:
            continue
        size = right.square().mean().sqrt().clamp_min(VANISHES)
        for part, (piece, truth) in enumerate(_stretches(ours, right, operation.tokens)):
            # Where the truth is next to nothing (the first tokens of a recurrence whose output is normalized), the
            # error counts against what it is elsewhere.
            least = size * truth.numel() ** 0.5
            error = ((piece - truth).norm() / torch.maximum(truth.norm(), least)).item()
            if not error <= STRETCH_BOUND[dtype]:
                raise ParityError(
                    f"{what}: at this very shape the {name} of its operation is off by {error:.2g} in stretch "
                    f"{part + 1} of {STRETCHES} of the tokens; {STRETCH_BOUND[dtype]:.2g} is allowed"
                )
    return Found(error=worst, bound=BOUND[dtype])


def _error(actual: Tensor, expected: Tensor) -> float:
    """The relative error; of a truth that vanishes (attention's gradients, with one token), the size of what is there.

    Inputs and the direction that gradients go back from are of size 1.
    """
    if expected.square().mean().sqrt() > VANISHES:
        return relative_error(actual, expected)
    size = actual.square().mean().sqrt().item()
    return size if size < float("inf") else float("inf")


def _stretches(actual: Tensor, expected: Tensor, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    length = actual.shape[dim]
    edges = sorted({round(i * length / STRETCHES) for i in range(STRETCHES + 1)})
    for begin, end in pairwise(edges):
        yield actual.narrow(dim, begin, end - begin), expected.narrow(dim, begin, end - begin)


def _results(operation: Operation, gradients: bool, *, truth: bool) -> Mapping[str, Tensor]:
    """Output and gradients of one side, in fp32 for the truth."""
    function = operation.truth if truth else operation.run
    leaves = {name: tensor.detach().requires_grad_(gradients) for name, tensor in operation.inputs.items()}
    # Gradients in bf16 would round the truth: its leaves are wide copies of the same numbers.
    if truth:
        leaves = {name: tensor.detach().float().requires_grad_(gradients) for name, tensor in leaves.items()}
    with torch.set_grad_enabled(gradients):
        output = function(leaves)
    if not gradients:
        return {"output": output}
    generator = torch.Generator(output.device).manual_seed(SEED)
    # Rounded alike for both, so that they go back from the same numbers.
    direction = torch.randn(output.shape, generator=generator, device=output.device).bfloat16()
    found = torch.autograd.grad(output, list(leaves.values()), direction.to(output.dtype))
    return {"output": output.detach(), **{f"gradient of {n}": g for n, g in zip(leaves, found, strict=True)}}
