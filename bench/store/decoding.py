"""JSON to dataclasses, strictly: a value of another type than its field's is an error, never a guess. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NoReturn, TypeVar

T = TypeVar("T")
MOST_DEEP = 32
MOST_WHOLE = 2**63 - 1
"""Whole numbers beyond it fit no table's column, and measure nothing."""


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return record


def parse_json(text: str) -> Any:
    """Parse JSON that a row may be.

    No NaN or Infinity, and no name twice in an object, for either would be read as somebody's guess; no whole number of
    more than 64 bits, no half of a surrogate pair, nothing nested deeply, for neither can be written or shown again.

    Raises:
        ValueError: Not such JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check(value, 0)
    return value


def _check(value: Any, depth: int) -> None:
    if depth > MOST_DEEP:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair") from None
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check(name, depth + 1)
            _check(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, depth + 1)
    elif isinstance(value, int) and abs(value) > MOST_WHOLE:
        raise ValueError("a whole number has more than 64 bits")


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def of_kind(line: str, kind: str, newest: int) -> tuple[dict[str, Any], int]:
    """A line's record and schema, both checked; for rows that say of which kind they are.

    Args:
        line: JSON.
        kind: What its ``kind`` must be.
        newest: The last schema that is known; all from 1 are.

    Raises:
        ValueError: It is something else.
    """
    record = parse_json(line)
    if not isinstance(record, dict) or record.pop("kind", None) != kind:
        raise ValueError(f"it is not of kind {kind!r}")
    version = record.pop("schema", None)
    if type(version) is not int or not 1 <= version <= newest:
        raise ValueError(f"it is of schema {version!r:.80}, and this version of the project reads 1 to {newest}")
    return record, version


def with_options(case: Any) -> dict[str, Any]:
    """A case's record as `decode_dataclass` takes it: its options, an object of words in a file, as sorted pairs.

    Raises:
        ValueError: No object, or options that are no such object.
    """
    options = case.get("options", {}) if isinstance(case, dict) else None
    if not isinstance(options, dict):
        raise ValueError("case.options must be an object")
    if not all(isinstance(value, str) for value in options.values()):
        raise ValueError("case.options must be words")
    return {**case, "options": [list(pair) for pair in sorted(options.items())]}


@cache
def _fields(kind: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@cache
def _required(kind: Any) -> frozenset[str]:
    """The fields without a default."""
    nothing = dataclasses.MISSING
    return frozenset(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is nothing and field.default_factory is nothing and field.init
    )


def decode_dataclass(kind: type[T], value: Any, where: str) -> T:
    """Build a dataclass from what `json.loads` gave; absent fields take their defaults, unknown ones are refused.

    Args:
        kind: The dataclass.
        value: A dict.
        where: Name of the value, for messages.

    Raises:
        ValueError: A field is missing, unknown, of another type, or refused by the dataclass itself.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object; got {value!r:.80}")
    fields = _fields(typing.cast(Any, kind))
    if unknown := value.keys() - fields.keys():
        raise ValueError(f"{where} has a field that this schema does not know: {min(unknown)!r:.80}")
    if absent := _required(typing.cast(Any, kind)) - value.keys():
        raise ValueError(f"{where} lacks {', '.join(sorted(absent))}")
    return kind(**{name: decode(fields[name], value[name], f"{where}.{name}") for name in value})


def decode(kind: Any, value: Any, where: str) -> Any:
    """One value as the type that a field declares: numbers, words, dataclasses, tuples, mappings and unions with None.

    Raises:
        ValueError: It is of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return decode(inner, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return decode_dataclass(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list; got {value!r:.80}")
        return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and origin is not Literal:  # a Mapping from names
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object; got {value!r:.80}")
        return {name: decode(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    elif (origin is Literal and type(value) is str and value in arguments) or type(value) is kind:
        return value
    expected = f"one of {', '.join(map(str, arguments))}" if origin is Literal else f"of type {kind.__name__}"
    raise ValueError(f"{where} must be {expected}; got {value!r:.80}")
