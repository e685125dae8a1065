"""Time a model's step with constants of the code changed, beside the step as it is, all in turns.

    python -m bench ops variants --set dig.raster_block.HALVED_TOKENS=0
    python -m bench ops variants --model DiG-S/2:triton --resolution 512 \\
        --set dig.raster._FEW_TOKENS=0 --set "dig.raster._FEW_TOKENS=0; dig.raster._FEW_PROGRAMS=16"

Each ``--set`` is one variant, of one constant or several with semicolons between them; a value is a Python literal, and
a constant is named in the module that reads it. Each variant is a CUDA graph of the whole step, as the benchmark
captures it; what comes of it is compared with the first's, bit for bit.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.cases.case import Case
from bench.judge.statistics import ratio_interval
from bench.ops.common import replaced
from bench.ops.turns import append_row, steps_in_turns


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A constant and what it is to be."""

    module: ModuleType
    name: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From ``dig.raster_block.HALVED_TOKENS=0``.

        Raises:
            ValueError: There is no such constant, or its value is of another type.
        """
        place, equals, literal = text.partition("=")
        path, _, name = place.strip().rpartition(".")
        if not equals or not path:
            raise ValueError(f"a setting is MODULE.NAME=VALUE, as dig.raster_block.HALVED_TOKENS=0; got {text!r}")
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            raise ValueError(f"{text!r}: there is no module {path} ({error})") from None
        if name not in module.__dict__:
            raise ValueError(f"{text!r}: {path} has no {name}")
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            raise ValueError(f"{text!r}: {literal!r} is no Python literal") from None
        kind = type(module.__dict__[name])
        if type(value) is not kind:
            raise ValueError(f"{text!r}: {place} is of type {kind.__name__}, {literal} of {type(value).__name__}")
        return cls(module=module, name=name, value=value)


@contextmanager
def applied(settings: Sequence[Setting]) -> Iterator[None]:
    """Let the constants have these values."""
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(replaced(setting.module, setting.name, setting.value))
        yield


def parse_variants(texts: Sequence[str]) -> dict[str, tuple[Setting, ...]]:
    """The step as it is, and the variants that the command line names, by what it calls them.

    Raises:
        ValueError: As of `Setting.parse`.
    """
    ways: dict[str, tuple[Setting, ...]] = {"as it is": ()}
    for text in texts:
        ways[text] = tuple(Setting.parse(part) for part in text.split(";"))
    return ways


def compare_variants(
    case: Case, variants: Mapping[str, Sequence[Setting]], *, rounds: int, replays: int, json_file: Path | None
) -> None:
    """Time a case's step in variants, in turns; print a line for each, with its ratio to the first.

    Args:
        case: On a GPU, as a CUDA graph.
        variants: What is set in each, by name.
        rounds: Two or more, as of `bench.ops.turns.steps_in_turns`.
        replays: As of the same.
        json_file: Takes a line for each too, where one is given.
    """
    contexts = [partial(applied, settings) for settings in variants.values()]
    found = steps_in_turns(case, contexts, rounds=rounds, replays=replays)
    print(f"{case.describe()} on {torch.cuda.get_device_name()}", flush=True)
    for name, way in zip(variants, found, strict=True):
        print(f"{name}: {way.describe()}", end="")
        if way is not found[0]:
            ratio = ratio_interval(found[0].ms, way.ms, paired=True)
            print(f", {ratio.ratio - 1:+.2%} [{ratio.low - 1:+.2%}, {ratio.high - 1:+.2%}]", end="")
            if case.mode == "forward":
                same = torch.equal(way.result, found[0].result)
                print(f", {'the same bits' if same else f'off by {way.distance(found[0]):.1e}'}", end="")
        print(flush=True)
        append_row(json_file, case, variant=name, samples_ms=way.ms)
