"""The fairness gate: what must hold before a number counts. A case that fails it is an error row, not a number.

The model computes what its reference computes; all models of a comparison are given the same; the kernels that the case
is named after are the ones that ran.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.results import Case, Mark
from bench.steps import check_output, make_inputs
from dig.family import Signature
from dig.layers import Backbone
from dig.registry import create_model, parse_name, reference_model

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
MOST_OFF = 0.1
"""The share of parameters whose gradient may be beyond its bound. One that hangs on a small difference of large terms
may be: the decay's, or a whole block's where a head's output, which is normalized, is next to nothing for a token. What
is wrong in a backward pass shows in a fifth of them (half the gradient of attention's values) or more (a causal mask, a
recurrence without its decay or in the other direction).
"""


REPLAY_ERROR = 1e-2
"""Of a graph's output, relative to the eager step's: the same kernels on the same numbers."""


class GateError(RuntimeError):
    """A case is not what its name says; the message says in what."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close a model is to its reference on a small input.

    Attributes:
        reference: Name and options of the reference.
        error: Of the output, relative to the reference in fp32.
        bound: What that error may be.
        gradients_off: Share of the parameters whose gradient is beyond its bound; None where only a forward pass is
            measured.
    """

    reference: str
    error: float
    bound: float
    gradients_off: float | None = None


def has_reference(case: Case) -> bool:
    """Whether anything computes what a case's model does: a reference, or the model if it is one."""
    return parse_name(case.model)[0].reference is not None


def reference_of(case: Case) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the reference that a case's model must agree with; None for a reference, or without one."""
    own = (case.model, dict(case.options))
    twin = reference_model(*own)
    return None if twin == own else twin


def _autocast(case: Case, dtype: str) -> torch.autocast:
    return torch.autocast(case.device, dtype=torch.bfloat16, enabled=dtype == "bf16")


def _shake(model: Backbone, deviation: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(deviation * torch.randn_like(parameter))


def _output(model: Backbone, inputs: tuple[Tensor, ...], case: Case, dtype: str) -> Tensor:
    """What a forward pass gives, by the code that a forward pass runs: without gradients, kernels may be others."""
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


def _error(actual: Tensor, expected: Tensor) -> float:
    """The relative error in the Euclidean norm; infinite where anything is not finite."""
    error = ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return error if error < float("inf") else float("inf")


def _errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By parameter; infinite where one side has no gradient."""
    return {
        name: _error(actual[name], expected[name]) if name in actual and name in expected else float("inf")
        for name in actual.keys() | expected.keys()
    }


def _give_weights(model: Backbone, reference: Backbone, case: Case, label: str) -> None:
    """Load the reference's weights into the model; `GateError` with the first that differ in name or shape."""
    own, theirs = (
        {name: getattr(w, "shape", None) for name, w in one.state_dict().items()} for one in (model, reference)
    )
    if differing := sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)):
        raise GateError(
            f"{case.model} has other weights than its reference ({label}): {len(differing)} differ in name or shape, "
            f"{', '.join(differing[:3])} first; name a reference that takes the same weights, or none"
        )
    model.load_state_dict(reference.state_dict())


def check_against_reference(case: Case) -> Agreement | None:
    """Compare a case's model with its reference: same weights, same small input; outputs, and gradients for training.

    Every parameter's gradient has a bound of its own, made from what the reference loses in it: taken together, the
    largest gradients, which are the last layer's, would hide the others.

    Returns:
        How close they are, or None where the case's model is the reference.

    Raises:
        GateError: They differ by more than the bound, or a result is not finite.
    """
    twin = reference_of(case)
    if twin is None:
        return None
    name, options = twin
    _, _, patch = parse_name(case.model)
    torch.manual_seed(0)
    with torch.device(case.device):
        reference = create_model(name, image_size=PIXELS_PER_PATCH * patch, **options).eval()
        own: dict[str, Any] = dict(case.options)
        model = create_model(case.model, image_size=PIXELS_PER_PATCH * patch, **own).eval()
        # Position embeddings are computed on the CPU, whatever the default device is.
        reference.to(case.device)
        model.to(case.device)
    x, _, t, y = (tensor.to(case.device) for tensor in make_inputs(model, 2)[0])
    label = " ".join([name, *(f"{key}={value}" for key, value in sorted(options.items()))])
    off = None
    if case.mode == "train":
        _shake(reference, GENTLE_SHAKE)
        _give_weights(model, reference, case, label)
        truth = _gradients(reference, (x, t, y), case, "fp32")
        rounded = _errors(_gradients(reference, (x, t, y), case, case.dtype), truth)
        errors = _errors(_gradients(model, (x, t, y), case, case.dtype), truth)
        bounds = {key: max(GRADIENT_FLOOR[case.dtype], ROUNDINGS * loss) for key, loss in rounded.items()}
        beyond = {key: error for key, error in errors.items() if not error <= bounds.get(key, 0.0)}
        off = len(beyond) / len(errors)
        if off > MOST_OFF:
            worst = max(beyond, key=lambda key: beyond[key])
            raise GateError(
                f"{case.model} differs from its reference ({label}) in the gradients of {len(beyond)} of {len(errors)} "
                f"parameters on a small input, most in {worst}, by {beyond[worst]:.2g}"
            )
        del truth  # As large as the model.
    _shake(reference, SHAKE)
    _give_weights(model, reference, case, label)
    expected = _output(reference, (x, t, y), case, "fp32")
    loss = _error(_output(reference, (x, t, y), case, case.dtype), expected)
    error = _error(_output(model, (x, t, y), case, case.dtype), expected)
    bound = min(max(FLOOR[case.dtype], ROUNDINGS * loss), MOST_ERROR)
    if not error <= bound:
        raise GateError(
            f"{case.model} differs from its reference ({label}) by {error:.2g} on a small input, {bound:.2g} is allowed"
        )
    return Agreement(reference=label, error=error, bound=bound, gradients_off=off)


def check_replay(eager: Tensor, replayed: Tensor) -> None:
    """Compare a forward pass' output as launched eagerly with what its CUDA graph writes, from the same inputs.

    A graph keeps addresses: of memory that was reused, or an input that was replaced, it reads what is there by then.
    (A training step moves the weights, so that its next result is another one anyway.)

    Raises:
        GateError: They differ by more than kernels that add in another order do.
    """
    error = _error(replayed.float().cpu(), eager)
    if not error <= REPLAY_ERROR:
        raise GateError(f"its CUDA graph computes something else than its eager step: they differ by {error:.2g}")


def tune_without_timing() -> None:
    """Let kernels that tune themselves take the first tiles that run, in this process and nowhere else.

    fla keeps what its tuner chose in a cache on the disk, by keys in which the number of tokens is missing: the tiles
    that are fastest on the gate's small input would be those of every case measured after it. Timing them is left out
    too, since nothing here is timed. Call it before fla is imported.
    """
    os.environ["FLA_CACHE_RESULTS"] = "0"
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return  # Then nothing tunes itself.

    def run_once(call: Callable[[], object], quantiles: Iterable[float]) -> list[float]:
        call()
        return [1.0 for _ in quantiles]

    # A property goes before what instances keep, or are given, of the attribute that it replaces.
    Autotuner.do_bench = property(lambda self: run_once, lambda self, given: None)


def _triton_kernels(package: str) -> frozenset[str]:
    """Names of the Triton kernels in a package's modules, of those that are loaded."""
    return frozenset(
        value.__name__
        for name, module in list(sys.modules.items())
        if f"{name}.".startswith(f"{package}.")
        for value in vars(module).values()
        if hasattr(value, "arg_names") and str(getattr(value, "__name__", "")).endswith("_kernel")
    )


def signature_of(case: Case) -> Signature | None:
    """How the kernels of a case's implementation are known; None where nobody said, or nothing could be said."""
    family, _, _ = parse_name(case.model)
    if case.execution == "compile" and case.device == "cpu":
        return None  # Inductor's fused loops have no names that say what they do.
    signature = family.signatures.get((case.device, family.backend_of(dict(case.options))))
    if signature is None or not signature.kernels_in:
        return signature
    own = "|".join(map(re.escape, sorted(_triton_kernels(signature.kernels_in)))) or r"(?!)"
    return Signature(expected=rf"\b(?:{own})", foreign=signature.foreign)


def doubts(case: Case, names: Collection[str]) -> list[Mark]:
    """What a reader should know of a case's checks: that nobody saw its kernels, or that it has no reference.

    Args:
        case: What ran.
        names: Kernels of its step, from the profiler.
    """
    family, _, _ = parse_name(case.model)
    is_reference = family.reference is not None and reference_of(case) is None
    # A reference is many plain operations, and has no kernel of its own.
    unknown = not is_reference and (case.device, family.backend_of(dict(case.options))) not in family.signatures
    marks: list[Mark] = []
    if not names or unknown:
        marks.append("unverified")
    if not has_reference(case):
        marks.append("no-reference")
    return marks


def check_kernels(case: Case, names: Iterable[str]) -> tuple[str, ...]:
    """The kernels, of those that a step ran, that show the case's implementation at work.

    Args:
        case: What was to run.
        names: Kernels (a GPU) or operators (a CPU) of one step, from the profiler, in full.

    Raises:
        GateError: The implementation's kernels did not run, or another's did.
    """
    ran = sorted(set(names))
    signature = signature_of(case)
    if signature is None:
        return ()
    shown = tuple(name[:200] for name in ran if re.search(signature.expected, name))
    foreign = [name for name in ran if re.search(signature.foreign, name)]
    if not shown or foreign:
        what = f"{foreign[0]:.120} ran" if foreign else f"no kernel of it ran; {len(ran)} others did: {ran[0]:.80}, ..."
        raise GateError(f"{case.describe()} is not what its name says: {what}")
    return shown
