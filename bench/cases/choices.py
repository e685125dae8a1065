"""What a command line's words stand for: device, defaults, and the one case of a command about a single model."""

from __future__ import annotations

from typing import Any, NoReturn, cast, get_args

from bench.cases.case import Case, Dtype, Execution, Mode
from bench.cases.suites import sweep
from bench.messages import check_count, refuse
from dig.environment import gpu_present
from dig.family import closest
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
    """What is measured where nobody says: a CUDA graph, which has no launches in it, or eager on a CPU."""
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
    """The case that ``--model DiG-XL/2:triton`` and its companions name; anything wrong ends the command."""
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


GRAMMAR = "MODEL[:OPTIONS]@RESOLUTION[:MODE][:EXECUTION][:batch=N][:DTYPE]"
"""How a command line names a case: ``DiG-S/2:triton@1792:train``; what is left out is as for ``bench run``, train."""


def parse_case(text: str, *, device: str) -> Case:
    """The case that ``--case DiG-S/2:triton@1792:train:batch=2`` names; anything wrong ends the command.

    Args:
        text: By `GRAMMAR`. The words after the resolution may come in any order.
        device: ``auto``, ``cuda`` or ``cpu``.
    """

    def wrong(what: str) -> NoReturn:
        refuse(f"--case {text[:200]!r}: {what}")

    model, at, rest = text.strip().rpartition("@")
    resolution, *words = rest.split(":")
    if not at or not model:
        wrong(f"a case is {GRAMMAR}, as DiG-S/2:triton@1792:train")
    kinds = {word: name for name, kind in _WORDS.items() for word in get_args(kind)}
    given: dict[str, str] = {}
    for word in words:
        name = "batch" if word.startswith("batch=") else kinds.get(word)
        if name is None:
            wrong(f"unknown word {word!r}: {closest(word, [*kinds, 'batch=N'])}")
        if name in given:
            wrong(f"{name} is given twice")
        given[name] = word.removeprefix("batch=")
    for name, number in (("the resolution", resolution), ("batch", given.get("batch", "1"))):
        if not (number.isascii() and number.isdecimal() and len(number) <= 20):
            wrong(f"{name} must be a whole number; got {number!r}")
    return one_case(
        model,
        resolution=int(resolution),
        mode=given.get("mode", "train"),
        execution=given.get("execution"),
        batch=int(given.get("batch", "1")),
        dtype=given.get("dtype"),
        device=device,
    )


_WORDS: dict[str, Any] = {"mode": Mode, "execution": Execution, "dtype": Dtype}
"""Of a case after its resolution, each known by itself."""
