"""The fairness gate: what must hold before a number counts. A case that fails it is an error row, not a number.

The model computes what its reference computes; all models of a comparison are given the same; the kernels that the case
is named after are the ones that ran.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.models import create_model, implementation_of, model_name, parse_name
from bench.results import Case
from bench.steps import make_inputs
from dig.layers import Backbone

PIXELS_PER_PATCH = 64
"""Side of the small image over the patch side: 8 × 8 tokens for every patch size."""
SHAKE = 0.05
"""Standard deviation added to every parameter: with adaLN-Zero's gates near zero no branch would reach the output."""
FLOOR = {"bf16": 3e-2, "fp32": 2e-3}
ROUNDINGS = 4.0
"""An error may be so many times what the reference itself loses in this dtype, or the floor where that is larger: a
kernel may round states that the reference keeps in fp32, and depth amplifies it; a wrong one is off by tens of percent.
"""


class GateError(RuntimeError):
    """A case is not what its name says; the message says in what."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close a model is to its reference on a small input: the larger relative error of output and gradients."""

    reference: str
    error: float
    bound: float


def reference_of(case: Case) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the reference that a case's model must agree with; None where it is the reference itself."""
    family, size, patch = parse_name(case.model)
    options = dict(case.options)
    chosen = implementation_of(family, options)
    if "reference" in family.options[family.implementation]:
        return None if chosen == "reference" else (case.model, {**options, family.implementation: "reference"})
    return None if family.name == "DiT" else (model_name("DiT", size, patch), {})


def _result(model: Backbone, inputs: tuple[Tensor, ...], device: str, dtype: str) -> list[Tensor]:
    """Output, and all gradients end to end, in fp64."""
    model.zero_grad()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16"):
        output = model(*inputs)
    output.float().square().mean().backward()
    gradients = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return [output.detach().double(), gradients]


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The larger relative error; infinite where anything is not finite."""
    errors = [((a - e).norm() / e.norm().clamp_min(1e-30)).item() for a, e in zip(actual, expected, strict=True)]
    return max(error if error < float("inf") else float("inf") for error in errors)


def check_against_reference(case: Case) -> Agreement | None:
    """Compare a case's model with its reference: same weights, same small input, output and every gradient.

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
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(SHAKE * torch.randn_like(parameter))
    model.load_state_dict(reference.state_dict())
    x, _, t, y = (tensor.to(case.device) for tensor in make_inputs(model, 2)[0])
    truth = _result(reference, (x, t, y), case.device, "fp32")
    rounded = _error(_result(reference, (x, t, y), case.device, case.dtype), truth)
    error = _error(_result(model, (x, t, y), case.device, case.dtype), truth)
    bound = max(FLOOR[case.dtype], ROUNDINGS * rounded)
    label = " ".join([name, *(f"{key}={value}" for key, value in sorted(options.items()))])
    if not error <= bound:
        raise GateError(
            f"{case.model} differs from its reference ({label}) by {error:.2g} on a small input, {bound:.2g} is allowed"
        )
    return Agreement(reference=label, error=error, bound=bound)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Kernels by which an implementation is known: one that ``expected`` finds must run, none that ``foreign`` finds.

    ``forward`` kernels only: they run in a training step too.
    """

    expected: str
    foreign: str = r"(?!)"


_FUSED_ATTENTION = r"flash_fwd|fmha|cudnn\w*sdpa|efficient_attention|scaled_dot_product_\w*flash"
SIGNATURES: dict[tuple[str, str], Signature] = {
    ("cuda", "materialized"): Signature(expected=r"(?i:softmax)", foreign=_FUSED_ATTENTION),
    ("cuda", "sdpa-cudnn"): Signature(expected=r"cudnn\w*(sdpa|flash|fmha|mha)", foreign=r"flash_fwd|(?i:softmax)"),
    ("cuda", "sdpa-flash"): Signature(expected=r"pytorch_flash\w*::flash_fwd", foreign=r"cudnn\w*sdpa|(?i:softmax)"),
    ("cuda", "flash-attn"): Signature(
        expected=r"(?<!pytorch_flash::)\bflash_fwd|\bflash::flash_fwd",
        foreign=r"pytorch_flash|cudnn\w*sdpa|(?i:softmax)",
    ),
    ("cuda", "fla"): Signature(expected=r"chunk_gla_fwd|chunk_fwd_kernel_h|fused_recurrent_gla|fused_chunk_gla"),
    ("cuda", "mamba-ssm"): Signature(expected=r"selective_scan_fwd"),
    ("cpu", "materialized"): Signature(expected=r"(?i:softmax)", foreign=_FUSED_ATTENTION),
    ("cpu", "sdpa-flash"): Signature(expected=r"scaled_dot_product_flash_attention", foreign=r"aten::softmax"),
}


def _own_kernels() -> frozenset[str]:
    """Names of this project's Triton kernels for the recurrence, read from the modules that are loaded."""
    return frozenset(
        value.__name__
        for name, module in list(sys.modules.items())
        if name.startswith("dig.ops.gla")
        for value in vars(module).values()
        if hasattr(value, "arg_names") and str(getattr(value, "__name__", "")).endswith("_kernel")
    )


def signature_of(case: Case) -> Signature | None:
    """How the kernels of a case's implementation are known; None for references made of many plain operations."""
    family, _, _ = parse_name(case.model)
    chosen = implementation_of(family, dict(case.options))
    if case.execution == "compile" and case.device == "cpu":
        return None  # Inductor's fused loops have no names that say what they do.
    if case.device == "cuda" and chosen == "triton":
        own = _own_kernels()
        return Signature(expected="|".join(map(re.escape, sorted(own))) or r"(?!)", foreign=r"chunk_gla_fwd")
    return SIGNATURES.get((case.device, chosen))


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
