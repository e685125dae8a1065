"""Time steps with kernels that start while the one before them ends, and without, in turns: see `dig.ops.early_launch`.

    python -m bench ops chain                                            # DiG-S/2 and XL/2 at several resolutions
    python -m bench ops chain --models DiG-S/2:triton --resolutions 512 --modes train

Each is a CUDA graph of the whole step, as the benchmark captures it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bench.cases.case import Case
from bench.ops.common import replaced
from bench.ops.turns import append_row, steps_in_turns
from dig.ops import launch


def compare_orders(case: Case, *, rounds: int, replays: int, json_file: Path | None) -> None:
    """Time a case's step with and without early launches, in turns, and print a line.

    Args:
        case: On a GPU, as a CUDA graph.
        rounds, replays: As of `bench.ops.turns.steps_in_turns`.
        json_file: Takes a line too, where one is given.
    """
    ways = [partial(replaced, launch, "launches_early", lambda device, able=able: able) for able in (True, False)]
    early, late = steps_in_turns(case, ways, rounds=rounds, replays=replays)
    print(
        f"{case.describe():75} early {early.median:8.3f} ms   in order {late.median:8.3f} ms   "
        f"{early.median / late.median - 1:+.2%}",
        flush=True,
    )
    append_row(json_file, case, early_ms=early.ms, in_order_ms=late.ms)
