"""What a command line's words stand for: device, defaults, and the one case of a command about a single model."""

from __future__ import annotations

from typing import Any, cast

from bench.cases.case import Case
from bench.cases.suites import sweep
from bench.messages import check_count, refuse
from dig.environment import gpu_present
from dig.registry import parse_family, parse_name


def choose_device(device: str, *, present: bool | None = None) -> str:
    """``cuda`` or ``cpu`` for ``auto``, ``cuda`` or ``cpu``; anything else, or a GPU that is not there, is refused."""
    if device not in ("auto", "cuda", "cpu"):
        refuse(f"unknown device {device!r}: choose auto, cuda or cpu")
    found = gpu_present() if present is None else present
    if device == "cuda" and not found:
        refuse("no NVIDIA GPU was found; use --device cpu, or run on a machine with one")
    return ("cuda" if found else "cpu") if device == "auto" else device


def default_execution(device: str) -> str:
    """The execution where nobody names one: a CUDA graph, which leaves launches out; eager on a CPU."""
    return "graph" if device == "cuda" else "eager"


def default_dtype(device: str) -> str:
    """bf16 on a GPU, fp32 on a CPU."""
    return "bf16" if device == "cuda" else "fp32"


def one_case(
    model: str,
    *,
    resolution: int,
    mode: str,
    execution: str | None,
    batch: int,
    dtype: str | None,
    device: str,
) -> Case:
    """The case that ``--model DiG-XL/2:triton`` and the options beside it name; anything wrong ends the command."""
    check_count(resolution, "--resolution")
    check_count(batch, "--batch")
    where = choose_device(device)
    try:
        family, rest, options = parse_family(model, sized=True)
        _, size, patch = parse_name(f"{family.name}{rest}")
        (case,) = sweep(
            [":".join([family.name, *(f"{option}={word}" for option, word in options.items())])],
            sizes=[size],
            patch=patch,
            resolutions=[resolution],
            modes=cast(Any, [mode]),
            executions=cast(Any, [execution or default_execution(where)]),
            batch=batch,
            dtype=cast(Any, dtype or default_dtype(where)),
            device=cast(Any, where),
        )
    except ValueError as error:
        refuse(str(error))
    if message := family.missing_packages(dict(case.options)):
        refuse(message)
    return case
