"""``bench.measure`` of Python: a model by name as the harness does it, a model or a step of one's own right here."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from bench.cases.case import Device, Dtype, Execution, Mode
from bench.store.rows import Row, read_results
from dig.environment import ROOT
from dig.fields import whole_number

if TYPE_CHECKING:
    from bench.measure.here import Here
    from dig.layers import Backbone


def measure(
    what: str | Backbone | Callable[[], object],
    *,
    mode: str = "forward",
    resolution: int | None = None,
    batch: int = 1,
    dtype: str | None = None,
    execution: str | None = None,
    device: str | None = None,
    out: Path | str | None = None,
) -> Row | Here:
    """Measure one model, or one step.

    Args:
        what: A name, ``DiG-S/2:triton``: measured as ``python -m bench run`` does, in a process of its own, with the
            parity check; the answer is its `bench.store.rows.Row`. A backbone, of `dig.load` say: a copy is timed in
            this process, on random inputs of its own size. Any other function: it is called without arguments, again
            and again. Of both the answer is a `bench.measure.here.Here`, whose ``marks`` say ``in-process``: nothing
            was compared with a reference, and nothing is known of the kernels.
        mode: ``train`` or ``forward``, of a model.
        resolution: Of a name, in pixels; 256 if not given. A backbone has its own.
        batch: Images a step; of a function, what ``fps`` counts.
        dtype: ``bf16`` or ``fp32``; bf16 on a GPU if not given.
        execution: Of a model; ``eager`` in this process if not given.
        device: Of a name or a function: ``cuda`` or ``cpu``.
        out: Of a name: the results file that the row is appended to.

    Raises:
        ValueError: It can't be measured so; the message says what to change.
        TypeError: It is neither a name, a backbone nor a function.
    """
    batch = whole_number("batch", batch)
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    resolution = resolution if resolution is None else whole_number("resolution", resolution)
    for name, word, words in (
        ("mode", mode, get_args(Mode)),
        ("dtype", dtype, (None, *get_args(Dtype))),
        ("execution", execution, (None, *get_args(Execution))),
        ("device", device, (None, *get_args(Device))),
    ):
        if word not in words:
            raise ValueError(f"{name} must be one of {', '.join(filter(None, words))}; got {word!r:.80}")
    if out is not None and not isinstance(out, str | Path):
        raise TypeError(f"out must be a path; got {out!r:.80}")
    if isinstance(what, str):
        options = {"modes": mode, "resolutions": resolution or 256, "batch": batch, "dtype": dtype, "device": device}
        return _by_name(what, {**options, "executions": execution}, out)
    if out is not None:
        raise ValueError("out is of a model by name: what is measured in this process is no row of a results file")
    if resolution is not None:
        raise ValueError("resolution is of a model by name: a backbone has its own size, and a step does what it does")
    from bench.measure.here import measure_model, measure_step
    from dig.layers import Backbone

    if isinstance(what, Backbone):
        return measure_model(what, mode=mode, batch=batch, dtype=dtype, execution=execution)
    from torch import nn

    if isinstance(what, nn.Module) or not callable(what):
        raise TypeError(
            f"measure takes a model's name, a dig.layers.Backbone or a function; got {type(what).__name__}; of another "
            "module, time a step: bench.measure(lambda: model(x))"
        )
    return measure_step(what, batch=batch, device=device)


def _by_name(name: str, options: dict[str, object], out: Path | str | None) -> Row:
    """One case by ``python -m bench run``: its processes start from a clean one, not from whatever this one is."""
    from dig.registry import parse_family, source_of

    family, rest, words = parse_family(name, sized=True)
    size, _, patch = rest.removeprefix("-").partition("/")
    text = ":".join([source_of(family.name) or family.name, *(f"{option}={word}" for option, word in words.items())])
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    # What is importable here is there too: a family of a script's own folder.
    path = os.pathsep.join([str(ROOT), *(folder or os.getcwd() for folder in sys.path)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl" if out is None else Path(out)
        before = len(read_results(file).rows) if file.exists() else 0
        command = [sys.executable, "-m", "bench", "run", f"--models={text}", f"--sizes={size}", f"--patch={patch}"]
        done = subprocess.run(
            [*command, *given, f"--out={file}"],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        rows = read_results(file).rows[before:] if file.exists() else []
    if not rows:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise ValueError(said[-1].removeprefix("error: ") if said else f"{name} was not measured: {done.stderr[-300:]}")
    return rows[-1]
