"""A family's operation against its truth at the shape that is timed: every output and gradient, stretch by stretch.

It is run as the model runs it: on inputs with the model's strides, and where the case compiles compiled too.

The whole tensor's error has a bound that a scaling of 5% is beyond. The error of each stretch of tokens has another, so
that a wrong tail, which is next to nothing in the whole, is found too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.cases.case import Case
from bench.parity.compiling import compile_options
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
TAIL = (16, 1)
"""Tokens at the end that are looked at by themselves: one of 16,384 is lost in any stretch."""
VANISHES = 1e-5
"""Root mean square of a truth that is nothing but rounding."""

Run = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The largest error of a whole tensor, and what it may be."""

    error: float
    bound: float


def check_operation(case: Case, model: Backbone) -> Found | None:
    """Compare the operation of a case's model with its truth, at the case's tokens, heads, batch and dtype.

    Args:
        case: What was timed: its mode decides whether gradients are compared, its execution whether the operation is
            compiled too.
        model: Of that case.

    Returns:
        None where the family names no operation, or the truth does not fit in memory.

    Raises:
        ParityError: An output or a gradient differs, as a whole or in a stretch of tokens, or what is to be compiled is
            not.
    """
    family, _, _ = parse_name(case.model)
    if family.operation is None:
        return None
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    options = compile_options(max_autotune=case.max_autotune) if case.compiles else None
    torch.manual_seed(SEED)
    try:
        operation = family.operation(model, case.batch, dtype)
        return compare(
            operation, case.dtype, gradients=case.mode == "train", what=case.describe(), compile_with=options
        )
    except torch.OutOfMemoryError:
        return None


def compare(
    operation: Operation, dtype: str, *, gradients: bool, what: str, compile_with: Mapping[str, Any] | None = None
) -> Found:
    """Compare an operation with its truth.

    Args:
        operation: Its inputs.
        dtype: ``bf16`` or ``fp32``: which bounds.
        gradients: Whether those of the inputs are compared too.
        what: Of whom the message speaks.
        compile_with: `torch.compile`'s arguments, to compare the compiled operation as well; None for eagerly alone.

    Raises:
        ParityError: They differ, or the operation was to be compiled and was not.
    """
    # Contiguous: what is wrong for some strides must not be wrong on both sides. Gradients in bf16 would round the
    # truth: its leaves are wide copies of the same numbers.
    wide = {name: tensor.detach().float().contiguous() for name, tensor in operation.inputs.items()}
    expected = _results(operation.truth, wide, gradients)
    del wide
    # Both ways where the case compiles. The compiled one is what was timed. The eager one is what the compiled step is
    # held against (`bench.measure.recheck`), and it tells a kernel's fault from the compiler's.
    worst = _compare(operation, _results(operation.run, operation.inputs, gradients), expected, dtype, what)
    if compile_with is not None:
        found = _compiled_results(operation, gradients, what, compile_with)
        worst = max(worst, _compare(operation, found, expected, dtype, what, way=" (compiled)"))
    return Found(error=worst, bound=BOUND[dtype])


def _compare(
    operation: Operation,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    dtype: str,
    what: str,
    *,
    way: str = "",
) -> float:
    """The largest error of a whole tensor.

    Raises:
        ParityError: It is beyond its bound, or that of a stretch of tokens is.
    """
    worst = 0.0
    for name, right in expected.items():
        ours = actual[name].float()
        error = _error(ours, right)
        worst = max(worst, error)
        if not error <= BOUND[dtype]:
            raise ParityError(
                f"{what}: at this very shape the {name} of its operation{way} is off by {error:.2g}; "
                f"{BOUND[dtype]:.2g} is allowed"
            )
        if name != "output" and name.removeprefix("gradient of ") not in operation.per_token:
            continue
        size = right.square().mean().sqrt().clamp_min(VANISHES)
        for begin, end in _stretches(right.shape[operation.tokens]):
            piece, truth = (x.narrow(operation.tokens, begin, end - begin) for x in (ours, right))
            # Where the truth is next to nothing (the first tokens of a recurrence whose output is normalized), the
            # error counts against what it is elsewhere.
            least = size * truth.numel() ** 0.5
            error = ((piece - truth).norm() / torch.maximum(truth.norm(), least)).item()
            if not error <= STRETCH_BOUND[dtype]:
                raise ParityError(
                    f"{what}: at this very shape the {name} of its operation{way} is off by {error:.2g} in tokens "
                    f"{begin} to {end - 1}; {STRETCH_BOUND[dtype]:.2g} is allowed"
                )
    return worst


def _error(actual: Tensor, expected: Tensor) -> float:
    """The relative error; of a truth that vanishes (attention's gradients, with one token), the size of what is there.

    Inputs and the direction that gradients go back from are of size 1.
    """
    if expected.square().mean().sqrt() > VANISHES:
        return relative_error(actual, expected)
    size = actual.square().mean().sqrt().item()
    return size if size < float("inf") else float("inf")


def _stretches(length: int) -> Iterator[tuple[int, int]]:
    """First and last but one of stretches of so many tokens."""
    edges = {round(i * length / STRETCHES) for i in range(STRETCHES + 1)} | {max(0, length - n) for n in TAIL}
    return pairwise(sorted(edges))


def _results(function: Run, inputs: Mapping[str, Tensor], gradients: bool) -> Mapping[str, Tensor]:
    """Output and gradients of one side; each input is a leaf of its own, with its own strides."""
    leaves = {name: tensor.detach().requires_grad_(gradients) for name, tensor in inputs.items()}
    with torch.set_grad_enabled(gradients):
        output = function(leaves)
    if not gradients:
        return {"output": output}
    generator = torch.Generator(output.device).manual_seed(SEED)
    # Rounded alike for both, so that they go back from the same numbers.
    direction = torch.randn(output.shape, generator=generator, device=output.device).bfloat16()
    found = torch.autograd.grad(output, list(leaves.values()), direction.to(output.dtype))
    return {"output": output.detach(), **{f"gradient of {n}": g for n, g in zip(leaves, found, strict=True)}}


def _compiled_results(
    operation: Operation, gradients: bool, what: str, options: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """`_results` of the operation compiled by itself; memory that runs out is raised as it is.

    Raises:
        ParityError: It cannot be compiled, fails compiled, or ran eagerly all the same.
    """
    run, traced = operation.run, list[bool]()

    def compiled(given: Mapping[str, Tensor]) -> Tensor:
        # Under the compiler a constant, True. Where PyTorch gives up (compilation is switched off, or this function was
        # compiled too often) it runs what is written here, and says so in a warning at most.
        traced.append(torch.compiler.is_compiling())
        return run(given)

    try:
        found = _results(torch.compile(compiled, **options), operation.inputs, gradients)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # The model was compiled, and timed. A row without this comparison would claim what nobody looked at.
        said = f"{type(error).__name__}: {error}"
        raise ParityError(f"{what}: its operation (compiled) cannot be compared; alone it fails: {said}") from error
    if traced != [True]:
        raise ParityError(f"{what}: its operation (compiled) cannot be compared; alone it ran eagerly all the same")
    return found
