"""The runs of ``examples/ablation.py``: the lines of its file, and the command that makes some of them again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.messages import visible
from dig.family import BACKEND
from reports.logs import Record, RunError, read_lines

_FOLDER = "out/ablation"
SCRIPT = f"python examples/ablation.py fashion-mnist {_FOLDER}"
RUNS = f"{_FOLDER}/ablation.jsonl"
"""Where the script, as it is called here, leaves its runs."""
TIMED = "seconds"
"""The experiment whose runs have equal seconds, and steps of their own."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A line of ``ablation.jsonl``, as `examples/ablation.py` writes it."""

    experiment: str
    arm: str
    model: str
    seed: int
    steps: int
    batch: int
    seconds: float
    ready: float | None
    loss: float
    frechet: float
    parameters: int | None
    samples: int
    sampling_steps: int
    about: tuple[str, ...]
    backend: str = ""


def read_ablation(path: Path) -> list[Run]:
    """All runs of a file; of a seed that stands twice, the last.

    Raises:
        RunError: It can't be read, or a line is none of these; the message names it.
    """
    lines = read_lines(path)
    found = {(run.experiment, run.arm, run.seed): run for run in map(_run, lines) if run is not None}
    if not found:
        raise RunError(f"{path} holds no run that ended; python examples/ablation.py makes them")
    return list(found.values())


def _run(line: Record) -> Run | None:
    """None of a run that diverged: it has no numbers, and its arm one seed less."""
    get = line.content.get
    if get("failed"):
        return None
    commit = f"commit {str(get('commit'))[:7]}{' with uncommitted changes' if get('dirty') else ''}"
    about = (get("gpu_name") or "a CPU", f"torch {get('torch')}", commit)
    experiment = line.word("experiment")
    samples, sampling_steps = line.whole("samples", 1), line.whole("sampling_steps", 1)
    return Run(
        experiment=experiment,
        arm=line.word("arm"),
        model=line.word("model"),
        seed=line.whole("seed"),
        steps=line.whole("steps", 1),
        batch=line.whole("batch", 1),
        seconds=line.number("seconds", positive=True),
        ready=None if get("ready_seconds") is None else line.number("ready_seconds"),
        loss=line.number("loss", positive=True),
        frechet=line.number("frechet", positive=True),
        parameters=None if get("parameters") is None else line.whole("parameters"),
        samples=samples,
        sampling_steps=sampling_steps,
        about=(*about, f"{samples:,} samples of {sampling_steps} steps"),
        backend=_backend(get("options")),
    )


def _backend(options: object) -> str:
    """What ran the model; empty where the line doesn't say."""
    found = options.get(BACKEND) if isinstance(options, dict) else None
    return found if isinstance(found, str) else ""


def repeating(
    experiments: Iterable[str],
    arms: Sequence[str] = (),
    *,
    seeds: int | None = None,
    steps: int | None = None,
    budget: float | None = None,
    batch: int | None = None,
    samples: int | None = None,
    sampling_steps: int | None = None,
) -> str:
    """The command that trains such runs again; what is None is left to `examples/ablation.py`."""
    given = {
        "experiments": ",".join(experiments), "arms": ",".join(arms), "seeds": seeds, "steps": steps,
        "budget": budget, "batch": batch, "samples": samples, "sampling-steps": sampling_steps,
    }  # fmt: skip
    words = [word for name, value in given.items() if value for word in (f"--{name}", str(value))]
    return visible(f"{SCRIPT} {shlex.join(words)}")


def repeating_runs(runs: Sequence[Run], arms: Sequence[str] = ()) -> str:
    """`repeating` of runs as they were made; of runs that differ in something as the last one was.

    Args:
        runs: At least one.
        arms: Those alone.
    """
    equal = [run for run in runs if run.experiment != TIMED]
    timed = [run for run in runs if run.experiment == TIMED]
    last = runs[-1]
    return repeating(
        dict.fromkeys(run.experiment for run in runs),
        arms,
        seeds=max(run.seed for run in runs) + 1,
        steps=equal[-1].steps if equal else None,
        # A run ends with the first group of steps after its budget.
        budget=int(timed[-1].seconds) if timed else None,
        batch=last.batch,
        samples=last.samples,
        sampling_steps=last.sampling_steps,
    )
