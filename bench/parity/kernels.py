"""The kernels that ran, checked against those that a case names."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable
from typing import Any

from bench.cases.case import Case
from bench.parity.error import ParityError
from bench.store.rows import Mark
from dig.family import Signature
from dig.registry import parse_name, reference_model


def has_reference(case: Case) -> bool:
    """Whether anything computes what a case's model does: a reference, or the model if it is one."""
    return parse_name(case.model)[0].reference is not None


def reference_of(case: Case) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the reference that a case's model must agree with; None for a reference, or without one."""
    own = (case.model, dict(case.options))
    twin = reference_model(*own)
    return None if twin == own else twin


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
    """The signature of a case's implementation; None where its family declares none, or has none to declare."""
    family, _, _ = parse_name(case.model)
    if case.execution == "compile" and case.device == "cpu":
        return None  # Inductor's fused loops have no names that say what they do.
    signature = family.signatures.get((case.device, family.backend_of(dict(case.options))))
    if signature is None or not signature.kernels_in:
        return signature
    own = "|".join(map(re.escape, sorted(_triton_kernels(signature.kernels_in)))) or r"(?!)"
    return Signature(expected=rf"\b(?:{own})", foreign=signature.foreign)


def doubts(case: Case, names: Collection[str]) -> list[Mark]:
    """A case's marks from the parity check: ``unverified`` kernels, ``no-reference``.

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
    """The kernels of a step that belong to the case's implementation.

    Args:
        case: What was to run.
        names: Kernels (a GPU) or operators (a CPU) of one step, from the profiler, in full.

    Raises:
        ParityError: The implementation's kernels did not run, or another's did.
    """
    ran = sorted(set(names))
    signature = signature_of(case)
    if signature is None:
        return ()
    shown = tuple(name[:200] for name in ran if re.search(signature.expected, name))
    foreign = [name for name in ran if re.search(signature.foreign, name)]
    if not shown or foreign:
        what = f"{foreign[0]:.120} ran" if foreign else f"no kernel of it ran; {len(ran)} others did: {ran[0]:.80}, ..."
        raise ParityError(f"{case.describe()} is not what its name says: {what}")
    return shown
