"""Steps of one case in several ways, captured as CUDA graphs that take turns: the card's clock is the same for all."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases.case import Case
from bench.measure.steps import build_step, capture, warm_up
from bench.store.files import append_line


@dataclass(frozen=True, kw_only=True)
class Way:
    """What one way of running a step took, and gave.

    Attributes:
        ms: Milliseconds a step, one number a round.
        result: What the last of its replays wrote.
    """

    ms: list[float]
    result: Tensor

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.ms)

    def describe(self) -> str:
        """The median, and the fastest and slowest round."""
        return f"{self.median:8.3f} ms  ({min(self.ms):.3f} to {max(self.ms):.3f})"

    def distance(self, other: Way) -> float:
        """Of its result from another's, relative to that."""
        difference = torch.linalg.vector_norm(self.result.double() - other.result.double())
        return float(difference / torch.linalg.vector_norm(other.result.double()))


def in_turns(replays: Sequence[Callable[[], object]], rounds: int, times: int) -> list[list[float]]:
    """Milliseconds of each of these, one number a round; they take turns, so that the card's clock is the same for all.

    Args:
        replays: Captured steps.
        rounds: How often each has its turn, beside one that warms the card up.
        times: Replays a turn, enqueued together.
    """
    taken: list[list[float]] = [[] for _ in replays]
    draw = random.Random(0)
    for turn in range(rounds + 1):
        for index in draw.sample(range(len(replays)), len(replays)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                replays[index]()
            end.record()
            end.synchronize()
            if turn:
                taken[index].append(start.elapsed_time(end) / times)
    return taken


def steps_in_turns(
    case: Case, ways: Iterable[Callable[[], AbstractContextManager[object]]], *, rounds: int, replays: int
) -> list[Way]:
    """Capture a case's step within each of these contexts, and let the graphs take turns.

    Args:
        case: On a GPU.
        ways: Each makes a context that changes how the step is run.
        rounds: As of `in_turns`.
        replays: Its ``times``.
    """
    step = build_step(case)
    captured = []
    for way in ways:
        with way():
            warm_up(step.run, case.device)
            captured.append(capture(step.run))
    times = in_turns([replay for replay, _ in captured], rounds, replays)
    found = []
    for (replay, result), ms in zip(captured, times, strict=True):
        replay()
        found.append(Way(ms=ms, result=result.clone()))
    return found


def append_row(path: Path | None, case: Case, **row: Any) -> None:
    """Append a row about a case to a file of JSON lines, where one is given."""
    if path is not None:
        append_line(path, json.dumps({"case": asdict(case), **row, "device": torch.cuda.get_device_name()}))
