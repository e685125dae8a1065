"""Which cases a run measures: a sweep over axes, or a named suite. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from bench.models import (
    FAMILIES,
    Family,
    UnknownModelError,
    check_options,
    check_resolution,
    closest,
    default_implementation,
    find_family,
    implementation_of,
    model_name,
)
from bench.results import Case, Device, Dtype, Execution, Mode

PAPER_RESOLUTIONS = (256, 512, 768, 1024, 1280, 1536, 1792, 2048)
PEERS = ("DiG:fla:variant=release", "DiT", "Flash-DiT:sdpa-cudnn", "Flash-DiT:flash-attn", "DiS:mamba-ssm")
"""The models of the paper's figures as they were published, each on the fastest published kernels."""
COMPARED = ("DiG:triton:variant=release", *PEERS)
"""What the suite measures: DiG on this project's kernels, and what it has to be compared with."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A family with options, as ``--models`` names it: ``DiG``, ``DiG:fla``, ``DiG:fla:variant=release``."""

    family: Family
    options: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str, device: str = "cpu") -> ModelChoice:
        """Read a family and its options; a word without ``=`` is the family's implementation.

        Args:
            text: As above.
            device: ``cuda`` or ``cpu``, which decides on the implementation where the text names none.

        Raises:
            UnknownModelError: No such family, option or value; the message offers the closest one.
        """
        name, *words = text.strip().split(":")
        family = find_family(name)
        options: dict[str, str] = {}
        for word in words:
            key, separator, value = word.partition("=")
            options.update({key: value} if separator else {family.implementation: word})
        check_options(family, options)
        options.setdefault(family.implementation, default_implementation(family, device))
        return cls(family=family, options=tuple(sorted(options.items())))


def sweep(
    models: Iterable[str],
    *,
    sizes: Sequence[str] = ("S",),
    patch: int = 2,
    resolutions: Sequence[int],
    modes: Sequence[Mode] = ("train",),
    executions: Sequence[Execution] = ("graph",),
    batch: int = 1,
    dtype: Dtype = "bf16",
    device: Device = "cuda",
) -> list[Case]:
    """Every combination, resolution by resolution, so that the models of one comparison are measured close together.

    Raises:
        ValueError: Something cannot be measured; the message says what to write instead.
    """
    choices = [ModelChoice.parse(text, device) for text in models]
    for axis, given, kind in (("mode", modes, Mode), ("execution", executions, Execution)):
        for value in given:
            if value not in get_args(kind):
                raise ValueError(f"unknown {axis} {value!r}: {closest(value, get_args(kind))}")
    if device == "cpu" and "graph" in executions:
        raise ValueError("execution graph is a CUDA graph and needs a GPU; use --executions eager on a CPU")
    cases = []
    for size, resolution, mode, execution, choice in itertools.product(sizes, resolutions, modes, executions, choices):
        check_resolution(resolution, patch)
        if device == "cpu" and implementation_of(choice.family, dict(choice.options)) in choice.family.gpu_only:
            runs = [v for v in choice.family.options[choice.family.implementation] if v not in choice.family.gpu_only]
            raise ValueError(
                f"{choice.family.name} runs on a CPU with {' or '.join(runs)} only, not {dict(choice.options)}"
            )
        cases.append(
            Case(
                model=model_name(choice.family.name, size, patch),
                options=choice.options,
                resolution=resolution,
                batch=batch,
                mode=mode,
                execution=execution,
                dtype=dtype,
                device=device,
            )
        )
    return cases


def without_repeats(cases: Iterable[Case]) -> list[Case]:
    """The cases in order, each once."""
    return list(dict.fromkeys(cases))


def figure_1(models: Iterable[str] = COMPARED, resolutions: Sequence[int] = PAPER_RESOLUTIONS) -> list[Case]:
    """Fig. 1 of the paper: S/2 against resolution, as a training step and as a forward pass, in CUDA graphs."""
    return sweep(models, resolutions=resolutions, modes=("train", "forward"))


def figure_2(models: Iterable[str] = COMPARED, resolutions: Sequence[int] = (1024, 2048)) -> list[Case]:
    """Fig. 2 of the paper: the forward pass of every size at 1024 and 2048."""
    return sweep(models, sizes=("S", "B", "L", "XL"), resolutions=resolutions, modes=("forward",))


def eager_probes(models: Iterable[str] = COMPARED, resolutions: Sequence[int] = (1024, 1792)) -> list[Case]:
    """S/2 in eager mode at two resolutions: what launches cost whoever does not use graphs."""
    return sweep(models, resolutions=resolutions, modes=("train", "forward"), executions=("eager",))


def paper_suite() -> list[Case]:
    """Both figures and the eager probes."""
    return without_repeats([*figure_1(), *figure_2(), *eager_probes()])


def cpu_suite() -> list[Case]:
    """Both figures in small, with the reference implementations, for a machine without a GPU."""
    models = list(FAMILIES)
    figure1 = sweep(models, resolutions=(64, 128, 192, 256), executions=("eager",), dtype="fp32", device="cpu")
    figure2 = sweep(
        models,
        sizes=("S", "B"),
        resolutions=(128,),
        modes=("forward",),
        executions=("eager",),
        dtype="fp32",
        device="cpu",
    )
    return without_repeats([*figure1, *figure2])


SUITES = {"paper": paper_suite, "cpu": cpu_suite}


def suite(name: str) -> list[Case]:
    """The cases of a suite by name."""
    if name not in SUITES:
        raise UnknownModelError(f"unknown suite {name!r}: {closest(name, SUITES)}")
    return SUITES[name]()
