"""What a command line's words stand for: device, defaults, and the one case of a command about a single model."""

from __future__ import annotations

from typing import Any, cast, get_args

from bench.cases.case import SCOPES, Case, Device, Dtype, Execution, Mode, Weights
from bench.cases.suites import sweep
from bench.messages import check_count, one_of, refuse
from dig.environment import gpu_present
from dig.family import closest
from dig.registry import find_family, parse_family, parse_name


def choose_device(device: str, *, present: bool | None = None) -> str:
    """``cuda`` or ``cpu`` for ``auto``, ``cuda`` or ``cpu``; anything else, or a GPU that is not there, is refused."""
    if device not in ("auto", "cuda", "cpu"):
        refuse(f"unknown --device {device[:80]!r}: choose auto, cuda or cpu")
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


def default_resolution(device: str, on_gpu: int = 1024) -> int:
    """Pixels where nobody names any: on a CPU so many that every family's training step takes seconds at most."""
    return on_gpu if device == "cuda" else 128


def one_case(
    model: str,
    *,
    resolution: int | None,
    mode: str,
    execution: str | None,
    batch: int,
    dtype: str | None,
    device: str,
    scope: str = "block",
    max_autotune: bool = False,
    weights: str = "fp32",
) -> Case:
    """The case that ``--model DiG-XL/2:triton`` and the options beside it name; anything wrong ends the command."""
    where = choose_device(device)
    resolution = default_resolution(where) if resolution is None else resolution
    check_count(resolution, "--resolution")
    check_count(batch, "--batch")
    one_of(mode, "--mode", get_args(Mode))
    one_of(scope, "--compile-scope", SCOPES)
    one_of(weights, "--weights", get_args(Weights))
    if execution is not None:
        one_of(execution, "--execution", get_args(Execution))
    if dtype is not None:
        one_of(dtype, "--dtype", get_args(Dtype))
    try:
        case = _case(
            model,
            where,
            resolution=resolution,
            mode=mode,
            execution=execution,
            batch=batch,
            dtype=dtype,
            scope=scope,
            max_autotune=max_autotune,
            weights=weights,
        )
    except ValueError as error:
        refuse(str(error))
    if message := find_family(case.family).missing_packages(dict(case.options)):
        refuse(message)
    return case


def _case(
    model: str,
    device: str,
    *,
    resolution: int,
    mode: str,
    execution: str | None,
    batch: int,
    dtype: str | None,
    scope: str,
    max_autotune: bool,
    weights: str,
) -> Case:
    """The case; ValueError where there is none such, on any machine."""
    family, rest, options = parse_family(model, sized=True)
    _, size, patch = parse_name(f"{family.name}{rest}")
    (case,) = sweep(
        [":".join([family.name, *(f"{option}={word}" for option, word in options.items())])],
        sizes=[size],
        patch=patch,
        resolutions=[resolution],
        modes=cast(Any, [mode]),
        executions=cast(Any, [default_execution(device) if execution is None else execution]),
        scope=cast(Any, scope),
        max_autotune=max_autotune,
        batch=batch,
        dtype=cast(Any, default_dtype(device) if dtype is None else dtype),
        weights=cast(Any, [weights]),
        device=cast(Any, device),
    )
    return case


GRAMMAR = "MODEL[:OPTIONS]@RESOLUTION[:MODE][:EXECUTION][:SCOPE][:max-autotune][:batch=N][:DTYPE]"
"""How a command line names a case: ``DiG-S/2:triton@1792:train``; what is left out is as for ``bench run``, train."""
GRAMMAR_WORDS = (
    "SCOPE is block or model, what one compilation covers; DTYPE is bf16, fp32 or bf16-weights (a forward pass of a "
    "model that was cast)"
)


def parse_case(text: str, *, device: str) -> Case:
    """The case that ``--case DiG-S/2:triton@1792:train:batch=2`` names; anything wrong ends the command.

    Args:
        text: By `GRAMMAR`. The words after the resolution may come in any order.
        device: ``auto``, ``cuda`` or ``cpu``.
    """
    try:
        model, given = _words_of(text)
    except ValueError as error:
        refuse(f"--case {text[:200]!r}: {error}")
    return one_case(model, device=device, **given)


def read_case(text: str, *, device: Device = "cuda") -> Case:
    """The case that these words name on some machine, which need not be this one: to look for its rows.

    Args:
        text: By `GRAMMAR`.
        device: Where it ran.

    Raises:
        ValueError: They name none.
    """
    model, given = _words_of(text)
    return _case(model, device, **given)


def _words_of(text: str) -> tuple[str, dict[str, Any]]:
    """The model of a case's words, and what `_case` takes beside it."""
    model, at, rest = text.strip().rpartition("@")
    resolution, *words = rest.split(":")
    if not at or not model:
        raise ValueError(f"a case is {GRAMMAR}, as DiG-S/2:triton@1792:train")
    kinds = {word: name for name, kind in _WORDS.items() for word in kind}
    given: dict[str, str] = {}
    for word in words:
        name = "batch" if word.startswith("batch=") else kinds.get(word)
        if name is None:
            raise ValueError(f"unknown word {word!r}: {closest(word, [*kinds, 'batch=N'])}")
        if name in given:
            raise ValueError(f"{name} is given twice")
        given[name] = word.removeprefix("batch=")
    for name, number in (("the resolution", resolution), ("batch", given.get("batch", "1"))):
        if not (number.isascii() and number.isdecimal() and len(number) <= 20):
            raise ValueError(f"{name} must be a whole number; got {number!r}")
    mode, execution, dtype = given.get("mode", "train"), given.get("execution"), given.get("dtype")
    if execution not in COMPILED and (of_compiling := [given[name] for name in ("scope", TUNED) if name in given]):
        raise ValueError(f"{of_compiling[0]} is of an execution that compiles: add {' or '.join(COMPILED)}")
    if dtype == CAST and mode != "forward":
        raise ValueError(f"{CAST} is of a forward pass, training keeps fp32 weights: add forward")
    return model, {
        "resolution": int(resolution),
        "mode": mode,
        "execution": execution,
        "batch": int(given.get("batch", "1")),
        "dtype": "bf16" if dtype == CAST else dtype,
        "scope": given.get("scope", "block"),
        "max_autotune": TUNED in given,
        "weights": "bf16" if dtype == CAST else "fp32",
    }


COMPILED, TUNED, CAST = ("compile", "compiled-graph"), "max-autotune", "bf16-weights"
_WORDS: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "execution": get_args(Execution),
    "scope": SCOPES,
    TUNED: (TUNED,),
    "dtype": (*get_args(Dtype), CAST),
}
"""Of a case after its resolution, each known by itself: those of `Case.way` and `Case.precision`."""
