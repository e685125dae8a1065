"""Which cases a run measures: a sweep over axes, or a named suite. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from bench.cases.case import CAPTURED, COMPILED, SCOPES, Case, Device, Dtype, Execution, Mode, Scope, Weights
from dig.family import BACKEND, Family, UnknownModelError, closest
from dig.registry import find_family, model_name, parse_family, source_of
from dig.spec import check_resolution

PAPER_RESOLUTIONS = (256, 512, 768, 1024, 1280, 1536, 1792, 2048)
PEERS = ("DiG:fla:variant=release", "DiT", "Flash-DiT:sdpa-cudnn", "Flash-DiT:flash-attn", "DiS:mamba-ssm")
"""The models of the paper's figures as they were published, each on the fastest published kernels."""
COMPARED = ("DiG:triton:variant=release", *PEERS)
"""What the suite measures: DiG on this project's kernels, and what it has to be compared with."""
ON_CPU = ("DiG", "DiT", "Flash-DiT", "DiS")
"""What is measured on a CPU unless something else is named: each on its reference implementation."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A family with options, as ``--models`` names it: ``DiG``, ``DiG:fla:variant=release``, ``my_module:MyFamily``.

    Attributes:
        family: The family.
        options: Of the family, sorted by name.
        source: Its import path, where it was named by that.
    """

    family: Family
    options: tuple[tuple[str, str], ...]
    source: str = ""

    @classmethod
    def parse(cls, text: str, device: str = "cpu") -> ModelChoice:
        """Read a family and its options; a word without ``=`` is the family's backend.

        Args:
            text: As above.
            device: ``cuda`` or ``cpu``, which decides on the backend where the text names none.

        Raises:
            UnknownModelError: No such family, option or value; the message offers the closest one.
            FamilyError: An import path that leads to no family.
        """
        family, rest, options = parse_family(text, sized=False)
        if rest:
            raise UnknownModelError(
                f"{family.name}{rest}: sizes and patch are axes of their own here; write {family.name}"
            )
        if family.backends:
            options.setdefault(BACKEND, family.default_backend(device))
        return cls(family=family, options=tuple(sorted(options.items())), source=source_of(family.name))

    def model(self, size: str, patch: int) -> str:
        """``DiG-S/2``, checked."""
        return model_name(self.family.name, size, patch)


def sweep(
    models: Iterable[str],
    *,
    sizes: Sequence[str] = ("S",),
    patch: int = 2,
    resolutions: Sequence[int],
    modes: Sequence[Mode] = ("train",),
    executions: Sequence[Execution] = ("graph",),
    scope: Scope = "block",
    max_autotune: bool = False,
    batch: int = 1,
    dtype: Dtype = "bf16",
    weights: Sequence[Weights] = ("fp32",),
    device: Device = "cuda",
) -> list[Case]:
    """Every combination, resolution by resolution, so that the models of one comparison are measured close together.

    Raises:
        ValueError: Something cannot be measured; the message says what to write instead.
    """
    choices = [ModelChoice.parse(text, device) for text in models]
    axes = (
        ("mode", modes, get_args(Mode)), ("execution", executions, get_args(Execution)),
        ("weights", weights, get_args(Weights)), ("compile-scope", (scope,), SCOPES),
    )  # fmt: skip
    for axis, given, known in axes:
        for value in given:
            if value not in known:
                raise ValueError(f"unknown {axis} {value!r}: {closest(value, known)}")
    if device == "cpu" and (found := set(CAPTURED) & set(executions)):
        raise ValueError(f"execution {min(found)} is a CUDA graph and needs a GPU; use --executions eager on a CPU")
    if max_autotune and not set(COMPILED) & set(executions):
        raise ValueError("--max-autotune is of executions that compile: compile or compiled-graph")
    if "bf16" in weights and (dtype == "fp32" or "forward" not in modes):
        raise ValueError("weights bf16 are for forward passes in bf16; add forward to --modes, with dtype bf16")
    cases = []
    for size, resolution, mode, execution, stored, choice in itertools.product(
        sizes, resolutions, modes, executions, weights, choices
    ):
        if stored == "bf16" and mode == "train":
            continue  # Of both modes, training keeps fp32 weights.
        check_resolution(resolution, patch)
        choice.family.require_device(dict(choice.options), device)
        cases.append(
            Case(
                model=choice.model(size, patch),
                options=choice.options,
                source=choice.source,
                resolution=resolution,
                batch=batch,
                mode=mode,
                execution=execution,
                scope=scope if execution in COMPILED else "",
                max_autotune=max_autotune and execution in COMPILED,
                dtype=dtype,
                weights=stored,
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
    """S/2 launched eagerly at two resolutions: what launches cost without graphs."""
    return sweep(models, resolutions=resolutions, modes=("train", "forward"), executions=("eager",))


def paper_suite() -> list[Case]:
    """Both figures and the eager probes."""
    return tuned_last(without_repeats([*figure_1(), *figure_2(), *eager_probes()]))


def cpu_suite() -> list[Case]:
    """Small versions of both figures, on reference implementations, for a machine without a GPU."""
    figure1 = sweep(ON_CPU, resolutions=(64, 128, 192, 256), executions=("eager",), dtype="fp32", device="cpu")
    figure2 = sweep(
        ON_CPU,
        sizes=("S", "B"),
        resolutions=(128,),
        modes=("forward",),
        executions=("eager",),
        dtype="fp32",
        device="cpu",
    )
    return without_repeats([*figure1, *figure2])


BEST_TRAINING = (
    ("S", 256, 1), ("S", 512, 1), ("S", 1024, 1), ("S", 1792, 1), ("S", 2048, 1), ("S", 256, 32), ("XL", 256, 32),
)  # fmt: skip
BEST_FORWARD = (
    ("S", 256, 1), ("XL", 256, 1), ("XL", 512, 1), ("XL", 1024, 1), ("XL", 2048, 1), ("XL", 256, 64), ("XL", 1024, 8),
)  # fmt: skip
"""Size, resolution and batch: one image at a time, a training batch, and the batches of guided sampling."""
SHORT, MEDIUM, LONG = 256, 512, 1024
"""Pixels, up to which what gains little or loses much elsewhere is measured too."""


def _ways(*, mode: Mode, size: str, resolution: int, batch: int) -> list[Case]:
    """One point in every way that may be some family's best: DiG in a graph, all others compiled and in a graph."""
    shared: dict[str, Any] = {
        "sizes": (size,), "resolutions": (resolution,), "modes": (mode,), "batch": batch,
        "weights": ("bf16",) if mode == "forward" else ("fp32",),
    }  # fmt: skip
    compiled: list[str] = ["Flash-DiT:sdpa-cudnn", "Flash-DiT:flash-attn-4"]
    if mode == "train" and size == "XL":
        # At its head width of 72 the gradient of the queries is wrong, which parity refuses; at 96 it is right.
        compiled.append("Flash-DiT:flash-attn-4-padded")
    if batch > 1 and resolution <= SHORT:
        compiled.append("Flash-DiT:flash-attn")
    if resolution <= MEDIUM:
        compiled.append("DiT")
    # Nowhere the fastest, and a case of either takes up to a minute to compile.
    thrice = batch == 1 and resolution in (SHORT, 1024, 2048)
    if thrice:
        compiled.append("DiS:mamba-ssm")
    if thrice or (batch > 1 and size == "S"):
        compiled.append("DiG:fla:variant=release")
    both: tuple[Execution, ...] = ("compiled-graph",)
    cases = sweep(("DiG:triton:variant=release",), executions=("graph",), **shared)
    cases += sweep(compiled, executions=both, **shared)
    if resolution <= LONG:
        # Where tokens are few, compiling the whole model gains 1 to 3% more in training and a fifth in a forward pass,
        # at 512 pixels an eighth. What is refused by block (FlashAttention 4's gradient at XL's head width) is refused.
        whole = [model for model in compiled if model.startswith("Flash-DiT") or model == "DiT"]
        if mode == "train" and size == "XL":
            whole.remove("Flash-DiT:flash-attn-4")
        if batch == 1 and resolution == SHORT:
            whole.append("DiG:fla:variant=release")
        cases += sweep(whole, executions=both, scope="model", **shared)
    return cases


def best_way(case: Case) -> Case | None:
    """The suite `best`'s first way of a case's model, in its mode, size, resolution and batch; None of others."""
    ways = _ways(mode=case.mode, size=case.size, resolution=case.resolution, batch=case.batch)
    return next((way for way in ways if (way.model, way.options) == (case.model, case.options)), None)


def best_suite() -> list[Case]:
    """Every family in every honest best way: compiled, in a graph, weights in bf16 for a forward pass."""
    points = [("train", *point) for point in BEST_TRAINING] + [("forward", *point) for point in BEST_FORWARD]
    cases = [
        case
        for mode, size, resolution, batch in points
        for case in _ways(mode=cast(Mode, mode), size=size, resolution=resolution, batch=batch)
    ]
    return tuned_last(without_repeats(cases))


def tuned_last(cases: Iterable[Case]) -> list[Case]:
    """The cases in order, but those whose kernels tune themselves for minutes last, so that plots fill early."""

    def tunes(case: Case) -> bool:
        family = find_family(case.family)
        return family.backend_of(dict(case.options)) in family.tunes

    return sorted(cases, key=tunes)


SUITES = {"paper": paper_suite, "best": best_suite, "cpu": cpu_suite}


def suite(name: str) -> list[Case]:
    """The cases of a suite by name."""
    if name not in SUITES:
        raise UnknownModelError(f"unknown suite {name!r}: {closest(name, SUITES)}")
    return SUITES[name]()
