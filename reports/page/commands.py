"""The command that measures a number again, as one line for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from bench.cases.case import Case
from bench.messages import visible
from bench.sampling.rows import Comparison, SamplingCase
from dig.family import BACKEND

Options = tuple[tuple[str, str], ...]


def model_words(family: str, options: Options, source: str = "") -> str:
    """A family as ``--models`` takes it: ``DiG:triton:variant=release``."""
    backend = [word for option, word in options if option == BACKEND]
    others = [f"{option}={word}" for option, word in options if option != BACKEND]
    return ":".join([source or family, *backend, *others])


def _joined(values: Iterable[object]) -> str:
    return ",".join(dict.fromkeys(map(str, values)))


def line(*words: str) -> str:
    """Words as a shell reads them, on one line whatever is in them."""
    return visible(shlex.join(["python", "-m", "bench", *words]))


def run_command(cases: Sequence[Case], *, launches: int = 1) -> str:
    """``python -m bench run`` of these cases and of whatever else the same axes make.

    Args:
        cases: At least one; of one batch, patch, dtype and device.
        launches: Process launches of each.
    """
    first = cases[0]
    words = [
        "run",
        "--models", _joined(model_words(case.family, case.options, case.source) for case in cases),
        "--sizes", _joined(case.size for case in cases),
        "--resolutions", _joined(sorted({case.resolution for case in cases})),
        "--modes", _joined(case.mode for case in cases),
        "--executions", _joined(case.execution for case in cases),
    ]  # fmt: skip
    usual = "bf16" if first.device == "cuda" else "fp32"
    scope = next((case.scope for case in cases if case.scope), "")
    given = {
        "--patch": str(first.patch) if first.patch != 2 else "",
        "--batch": str(first.batch) if first.batch != 1 else "",
        "--compile-scope": scope if scope not in ("", "block") else "",
        "--dtype": first.dtype if first.dtype != usual else "",
        "--weights": _joined(case.weights for case in cases) if any(case.weights != "fp32" for case in cases) else "",
        "--device": first.device if first.device == "cpu" else "",
        "--launches": str(launches) if launches > 1 else "",
    }
    words += [word for option, value in given.items() if value for word in (option, value)]
    words += ["--max-autotune"] if any(case.max_autotune for case in cases) else []
    return line(*words)


def scaling_command(case: Case) -> str:
    """``python -m bench scaling`` of a case of several processes, beside one process as that command measures it."""
    words = [
        "scaling", "--models", model_words(case.family, case.options, case.source), "--size", case.size,
        "--resolution", str(case.resolution), "--batch", str(case.batch), "--processes", str(case.processes),
        "--parallel", case.parallel, "--sending", case.sending, "--executions", "graph" if case.captures else "eager",
    ]  # fmt: skip
    words += ["--patch", str(case.patch)] if case.patch != 2 else []
    words += ["--dtype", case.dtype] if case.dtype != ("bf16" if case.device == "cuda" else "fp32") else []
    return line(*words, *(["--device", "cpu"] if case.device == "cpu" else []))


def sampling_command(entry: Comparison, peers: Sequence[SamplingCase] = ()) -> str:
    """``python -m bench sampling`` of a row, beside the model that it was compared with.

    Args:
        entry: The row.
        peers: The models of its run, the peer last; of none it is measured alone.
    """
    case = entry.row.case
    models = [f"{model_words(each.family, each.options, each.source)}@{each.execution}" for each in (peers or [case])]
    size, _, patch = case.model.rpartition("-")[2].partition("/")
    words = [
        "sampling", "--models", _joined(models), "--size", size, "--resolutions", str(case.resolution),
        "--batch", str(case.batch), "--sampler", case.sampler, "--steps", str(case.steps), "--cfg", f"{case.cfg:g}",
    ]  # fmt: skip
    scopes = [each.scope for each in peers or [case] if each.scope]
    usual = "bf16" if case.device == "cuda" else "fp32"
    given = {
        "--patch": patch if patch != "2" else "",
        "--cfg-channels": case.cfg_channels if case.cfg_channels != "three" else "",
        "--compile-scope": next((scope for scope in scopes if scope != "block"), ""),
        "--dtype": case.dtype if case.dtype != usual else "",
        "--weights": case.weights if case.weights != "fp32" else "",
        "--device": "cpu" if case.device == "cpu" else "",
    }
    return line(*words, *(word for option, value in given.items() if value for word in (option, value)))


def _one_model(case: Case) -> str:
    return ":".join([case.model, *model_words("", case.options).split(":")[1:]])


def capacity_command(case: Case, *, resolution: int, batch: int, limit: int | None = None) -> str:
    """``python -m bench capacity`` of a case's model."""
    words = [
        "capacity", "--model", _one_model(case), "--mode", case.mode, "--resolution", str(resolution),
        "--batch", str(batch), "--execution", case.execution,
    ]  # fmt: skip
    words += [] if limit is None else ["--limit", f"{limit / 2**30:g}"]
    return line(*words)


def profile_command(case: Case) -> str:
    """``python -m bench profile`` of a case's step, as a row beside others."""
    words = ["profile", "--model", _one_model(case), "--resolution", str(case.resolution), "--mode", case.mode]
    words += ["--batch", str(case.batch)] if case.batch != 1 else []
    words += ["--device", "cpu"] if case.device == "cpu" else []
    return line(*words, "--rows", "out/profiles.jsonl")
