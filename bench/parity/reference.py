"""A model against its reference on a small input: same weights, same inputs; outputs and gradients must be close."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.cases.case import Case
from bench.parity.error import ParityError, relative_error
from bench.parity.inputs import check_output, make_inputs
from bench.parity.kernels import reference_of
from dig.layers import Backbone
from dig.registry import parse_name
from dig.spec import create_model

PIXELS_PER_PATCH = 64
"""Side of the small image over the patch side: 8 × 8 tokens for every patch size."""
SHAKE = 0.05
"""Standard deviation added to every parameter before outputs are compared: with adaLN-Zero's gates near zero no branch
would reach the output.
"""
GENTLE_SHAKE = 0.02
"""The same before gradients are compared. Backwards a model shaken harder is so steep that bf16 alone moves half of a
deep DiG's gradient, and a bound made from that would pass anything.
"""
FLOOR = {"bf16": 3e-2, "fp32": 2e-3}
GRADIENT_FLOOR = {"bf16": 0.2, "fp32": 1e-2}
"""The same for the gradient of one parameter. Kernels that keep the residual stream in bf16, which the reference does
not, are off by 10% in the last of 12 blocks.
"""
ROUNDINGS = 4.0
"""An error may be so many times what the reference itself loses in this dtype, or the floor where that is larger: a
kernel may round states that the reference keeps in fp32, and depth amplifies it; a wrong one is off by tens of percent.
"""
MOST_ERROR = 0.5
"""No bound on an output is above this, whatever the rounding: noise of the output's own size has an error of 1."""
DRAWS = 3
"""Weights that gradients are compared with, at most: the first draw settles it where it agrees; else two of three must.
One draw says little of a deep model where a token's output, which is normalized, is next to nothing: a rounding there
moves the gradients of all blocks below it. Of three draws on an H100, DiG-XL/2 with chunks of 64 was refused on one (87
of 319 gradients), with chunks of 16 on another (32); on the rest neither had a gradient off. What is wrong is wrong on
every draw.
"""
MOST_OFF = 0.1
"""The share of parameters whose gradient may be beyond its bound. One that hangs on a small difference of large terms
may be: the decay's, or a whole block's where a head's output, which is normalized, is next to nothing for a token. What
is wrong in a backward pass shows in a fifth of them (half the gradient of attention's values) or more (a causal mask, a
recurrence without its decay or in the other direction).
"""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close a model is to its reference on a small input.

    Attributes:
        reference: Name and options of the reference.
        error: Of the output, relative to the reference in fp32.
        bound: What that error may be.
        gradients_off: Share of the parameters whose gradient is beyond its bound, the middle one of all draws; None
            where only a forward pass is measured.
        draws: How many draws of weights gradients were compared with; 0 where only a forward pass is measured.
    """

    reference: str
    error: float
    bound: float
    gradients_off: float | None = None
    draws: int = 0


def _autocast(case: Case, dtype: str) -> torch.autocast:
    return torch.autocast(case.device, dtype=torch.bfloat16, enabled=dtype == "bf16")


def _shake(model: Backbone, deviation: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(deviation * torch.randn_like(parameter))


def _output(model: Backbone, inputs: tuple[Tensor, ...], case: Case, dtype: str) -> Tensor:
    """The output of a forward pass without gradients, because kernels may differ with them."""
    with torch.no_grad(), _autocast(case, dtype):
        return check_output(model(*inputs), inputs[0]).float()


def _gradients(model: Backbone, inputs: tuple[Tensor, ...], case: Case, dtype: str) -> dict[str, Tensor]:
    """The gradient of every parameter; they are the caller's, and the model keeps none."""
    model.zero_grad(set_to_none=True)
    with _autocast(case, dtype):
        output = check_output(model(*inputs), inputs[0])
    output.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By parameter; infinite where one side has no gradient."""
    return {
        name: relative_error(actual[name], expected[name]) if name in actual and name in expected else float("inf")
        for name in actual.keys() | expected.keys()
    }


def _give_weights(model: Backbone, reference: Backbone, case: Case, label: str) -> None:
    """Load the reference's weights into the model; `ParityError` with the first that differ in name or shape."""
    own, theirs = (
        {name: getattr(w, "shape", None) for name, w in one.state_dict().items()} for one in (model, reference)
    )
    if differing := sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)):
        raise ParityError(
            f"{case.model} has other weights than its reference ({label}): {len(differing)} differ in name or shape, "
            f"{', '.join(differing[:3])} first; name a reference that takes the same weights, or none"
        )
    model.load_state_dict(reference.state_dict())


def _pair(case: Case, name: str, options: dict[str, Any], patch: int, draw: int) -> tuple[Backbone, Backbone]:
    """The reference with weights of this draw, and the case's model, which is still to be given them."""
    torch.manual_seed(draw)
    with torch.device(case.device):
        reference = create_model(name, image_size=PIXELS_PER_PATCH * patch, **options).eval()
        own: dict[str, Any] = dict(case.options)
        model = create_model(case.model, image_size=PIXELS_PER_PATCH * patch, **own).eval()
        # Position embeddings are computed on the CPU, whatever the default device is.
        return reference.to(case.device), model.to(case.device)


def _settled(draws: int, refusals: int) -> bool:
    """Whether no further draw of weights can change the verdict, or the first one agrees."""
    most = DRAWS // 2
    return draws > 0 and (refusals == 0 or refusals > most or draws - refusals > most)


def _compare_gradients(
    case: Case, reference: Backbone, model: Backbone, inputs: tuple[Tensor, ...], label: str
) -> tuple[float, str]:
    """Shake the reference gently, and compare both models' gradients.

    Returns:
        The share that is beyond its bound, and what is to be said where this is more than `MOST_OFF`, else nothing.

    Raises:
        ParityError: A result is not finite.
    """
    _shake(reference, GENTLE_SHAKE)
    _give_weights(model, reference, case, label)
    truth = _gradients(reference, inputs, case, "fp32")
    rounded = _errors(_gradients(reference, inputs, case, case.dtype), truth)
    errors = _errors(_gradients(model, inputs, case, case.dtype), truth)
    bounds = {key: max(GRADIENT_FLOOR[case.dtype], ROUNDINGS * loss) for key, loss in rounded.items()}
    beyond = {key: error for key, error in errors.items() if not error <= bounds.get(key, 0.0)}
    off = len(beyond) / len(errors)
    if off <= MOST_OFF:
        return off, ""
    worst = max(beyond, key=lambda key: beyond[key])
    return off, (
        f"{case.model} differs from its reference ({label}) in the gradients of {len(beyond)} of {len(errors)} "
        f"parameters on a small input, most in {worst}, by {beyond[worst]:.2g}"
    )


def check_against_reference(case: Case) -> Agreement | None:
    """Compare a case's model with its reference: same weights, same small input; outputs, and gradients for training.

    Every parameter's gradient has a bound of its own, made from what the reference loses in it: in one norm, the
    largest gradients, the last layer's, would hide the others.

    Returns:
        How close they are, or None where the case's model is the reference.

    Raises:
        ParityError: They differ by more than the bound, or a result is not finite.
    """
    twin = reference_of(case)
    if twin is None:
        return None
    name, options = twin
    _, _, patch = parse_name(case.model)
    label = " ".join([name, *(f"{key}={value}" for key, value in sorted(options.items()))])
    reference, model = _pair(case, name, options, patch, 0)
    inputs = tuple(tensor.to(case.device) for tensor in make_inputs(model, 2)[0])
    x, t, y = inputs[0], inputs[2], inputs[3]
    shares: list[float] = []
    refusals: list[str] = []
    while case.mode == "train" and not _settled(len(shares), len(refusals)):
        if shares:
            del reference, model  # Before the next pair takes as much memory.
            reference, model = _pair(case, name, options, patch, len(shares))
        off, refusal = _compare_gradients(case, reference, model, (x, t, y), label)
        shares.append(off)
        refusals += [refusal] if refusal else []
    if 2 * len(refusals) > DRAWS:
        raise ParityError(refusals[0])
    _shake(reference, SHAKE)
    _give_weights(model, reference, case, label)
    expected = _output(reference, (x, t, y), case, "fp32")
    loss = relative_error(_output(reference, (x, t, y), case, case.dtype), expected)
    error = relative_error(_output(model, (x, t, y), case, case.dtype), expected)
    bound = min(max(FLOOR[case.dtype], ROUNDINGS * loss), MOST_ERROR)
    if not error <= bound:
        raise ParityError(
            f"{case.model} differs from its reference ({label}) by {error:.2g} on a small input, {bound:.2g} is allowed"
        )
    middle = median(shares) if shares else None
    return Agreement(reference=label, error=error, bound=bound, gradients_off=middle, draws=len(shares))


def check_output_of(case: Case, model: Backbone, inputs: tuple[Tensor, ...], output: Tensor) -> float | None:
    """Compare what a case's timed step made of these inputs with its reference, at the case's own shape and weights.

    Args:
        case: A forward pass.
        model: Whose weights the reference gets.
        inputs: x, t and y.
        output: Of the timed step.

    Returns:
        The relative error; None where the case's model is the reference.

    Raises:
        ParityError: It is beyond its bound, which is made as in `check_against_reference`.
        torch.OutOfMemoryError: The reference does not fit beside what was timed.
    """
    twin = reference_of(case)
    if twin is None:
        return None
    name, options = twin
    with torch.device(case.device):
        reference = create_model(name, image_size=case.resolution, **options).eval()
    reference.to(case.device)
    reference.load_state_dict(model.state_dict())
    x, t, y = inputs
    expected = _output(reference, (x.float(), t, y), case, "fp32")
    loss = relative_error(_output(reference, (x.float(), t, y), case, case.dtype), expected)
    error = relative_error(output.float(), expected)
    bound = min(max(FLOOR[case.dtype], ROUNDINGS * loss), MOST_ERROR)
    if not error <= bound:
        raise ParityError(
            f"after the timed steps, on other inputs, its output differs from its reference's ({name}) by {error:.2g}; "
            f"{bound:.2g} is allowed"
        )
    return error
