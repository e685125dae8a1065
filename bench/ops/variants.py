"""Time a model's step with constants of the code changed, beside the step as it is, all in turns.

    python -m bench ops variants --set dig.ops.tiles.sm90.PASSES.halved_tokens=0
    python -m bench ops variants --model DiG-S/2:triton --resolution 512 \\
        --set dig.ops.tiles.sm90.PASSES.beside_tokens=0 \\
        --set "dig.ops.tiles.sm90.PASSES.beside_tokens=0; dig.ops.tiles.sm90.PASSES.beside_programs=16"
    python -m bench ops variants --set dig.ops.tiles.sm90.GLA.walk_chunks=8

Each ``--set`` is one variant, of one constant or several with semicolons between them; a value is a Python literal, and
a constant is named in the module that reads it. Of tile choices a field is named; of a table of them it is set in all
entries. Each variant is a CUDA graph of the whole step, as the benchmark captures it; what comes of it is compared with
the first's, bit for bit.

Nothing is compiled apart first: a cap on registers that makes a kernel spill beside asynchronous products, which
``python -m bench ops registers`` refuses, can end the run with a CUDA error.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.cases.case import Case
from bench.judge.statistics import ratio_interval
from bench.ops.common import replaced
from bench.ops.turns import append_row, steps_in_turns
from dig.ops.tiles import forget_choices


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A constant and what it is to be.

    Attributes:
        module: Where it is read.
        name: Its name there.
        value: What it is to be.
        field: Where the constant is one of tile choices, or a table of them: the field that is set, in every entry.
    """

    module: ModuleType
    name: str
    value: Any
    field: str = ""

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From ``dig.ops.tiles.sm90.PASSES.halved_tokens=0``.

        Raises:
            ValueError: There is no such constant, or its value is of another type or out of range.
        """
        place, equals, literal = text.partition("=")
        path, _, name = place.strip().rpartition(".")
        if not equals or not path:
            raise ValueError(f"a setting is MODULE.NAME=VALUE, as dig.ops.tiles.sm90.GLA.walk_chunks=0; got {text!r}")
        module, name, field = _find(text, path, name)
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            raise ValueError(f"{text!r}: {literal!r} is no Python literal") from None
        if field:
            kinds = {type(getattr(entry, field)) for entry in _entries(module.__dict__[name]).values()}
            # What may be left to the compiler, or counted.
            kinds |= {int} if type(None) in kinds else set()
        else:
            kinds = {type(module.__dict__[name])}
        if type(value) not in kinds:
            names = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"{text!r}: {place} is of type {names}, {literal} of {type(value).__name__}")
        setting = cls(module=module, name=name, value=value, field=field)
        if field:
            setting.changed()
        return setting

    def changed(self) -> dict[Any, Any]:
        """The tile choices as they are to be, by their place in the table.

        Raises:
            ValueError: No tile choice has such a value.
        """
        found = _entries(self.module.__dict__[self.name])
        return {place: replace(entry, **{self.field: self.value}) for place, entry in found.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let it have this value."""
        if not self.field:
            with replaced(self.module, self.name, self.value):
                yield
            return
        chosen = self.module.__dict__[self.name]
        before = _entries(chosen)
        _put(chosen, self.changed())
        try:
            yield
        finally:
            _put(chosen, before)


def _entries(chosen: Any) -> dict[Any, Any]:
    """Tile choices by their place in a table; by None where they are not in one. Copies: see `_put`.

    Raises:
        ValueError: Something else.
    """
    entries = dict(chosen) if isinstance(chosen, dict) else {None: chosen}
    if not entries or not all(is_dataclass(entry) and not isinstance(entry, type) for entry in entries.values()):
        raise ValueError("these are no tile choices")
    return {place: replace(entry) for place, entry in entries.items()}


def _put(chosen: Any, entries: Mapping[Any, Any]) -> None:
    """Let a table, or the choices themselves, be these. An architecture holds them by reference."""
    if isinstance(chosen, dict):
        chosen.update(entries)
    else:
        for each in fields(chosen):
            object.__setattr__(chosen, each.name, getattr(entries[None], each.name))
    forget_choices()


def _find(text: str, path: str, name: str) -> tuple[ModuleType, str, str]:
    """Module, constant and, where that is a table of tile choices, the field that ``path.name`` names."""
    try:
        module, field = importlib.import_module(path), ""
    except ImportError as error:
        outer, _, constant = path.rpartition(".")
        message = f"{text!r}: there is no module {path} ({error})"
        try:
            module = importlib.import_module(outer or path)
            entries = _entries(module.__dict__.get(constant))
        except (ImportError, ValueError):
            raise ValueError(message) from None
        path, name, field = outer, constant, name
        if not all(hasattr(entry, field) for entry in entries.values()):
            raise ValueError(f"{text!r}: {path}.{name} has no {field}") from None
    if name not in module.__dict__:
        raise ValueError(f"{text!r}: {path} has no {name}")
    return module, name, field


@contextmanager
def applied(settings: Sequence[Setting]) -> Iterator[None]:
    """Let the constants have these values."""
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting.applied())
        yield


def parse_variants(texts: Sequence[str]) -> dict[str, tuple[Setting, ...]]:
    """The step as it is, and the variants that the command line names, by what it calls them.

    Raises:
        ValueError: As of `Setting.parse`, beside those of the variant that precede it.
    """
    ways: dict[str, tuple[Setting, ...]] = {"as it is": ()}
    for text in texts:
        with ExitStack() as stack:
            settings: list[Setting] = []
            for part in text.split(";"):
                settings.append(Setting.parse(part))
                # What follows may be possible beside it alone: fewer groups with fewer warps, say.
                stack.enter_context(settings[-1].applied())
            ways[text] = tuple(settings)
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
