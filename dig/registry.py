"""Models' names: families are registered here, and whoever reads a name asks here. Nothing lies below this.

Families come from three places: `dig.discovery` finds those that packages declare (this project's own among them); a
script registers its own with `register`; and ``my_package.my_module:MyFamily`` on a command line names one by its
import path. Importing this module imports no torch, nor does finding a family of this project: names and options are
checked before any of that starts. What is heavy is imported when a model is built, which is `dig.spec`'s.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, overload

from dig import discovery
from dig.family import BACKEND, Family, FamilyError, UnknownModelError, closest
from dig.packages import MissingPackageError, is_installed

T = TypeVar("T")

PATCHES = (2, 4, 8)
_ATTRIBUTE = "__dig_family__"
"""Where `register` leaves the family on the class or function that it decorates."""

_families: dict[str, Family] = {}
_sources: dict[str, str] = {}
"""Family → the import path that it was asked for by, where no package declares it."""


@overload
def register(family: Family, /) -> Family: ...


@overload
def register(**fields: Any) -> Callable[[T], T]: ...


def register(family: Any = None, /, **fields: Any) -> Any:
    """Make a family known: ``register(Family(...))``, or as a decorator of what builds it.

    ``@register(sizes=("S",), ...)`` on a class or function is a `Family` whose ``build`` it is and whose name, unless
    given, is its own; the class or function stays what it was.

    Raises:
        FamilyError: Another family has this name, this is none, or the class leaves out what a `dig.layers.Backbone`
            must define; the message names family and field.
    """
    if family is not None:
        if not isinstance(family, Family):
            name = getattr(family, "__name__", None) or repr(family)
            raise FamilyError(f"register takes a Family; to decorate {name:.80}, write @register(sizes=('S', 'B'))")
        _add(family)
        return family

    def decorate(build: T) -> T:
        said = {"name": getattr(build, "__name__", ""), **fields, "build": build}
        known = [entry.name for entry in dataclasses.fields(Family)]
        if alien := [name for name in said if name not in known]:
            raise FamilyError(f"unknown field {alien[0]!r} of {said['name']}: {closest(alien[0], known)}")
        if "sizes" not in said:
            raise FamilyError(f"{said['name']} needs sizes such as ('S', 'B')")
        made = Family(**said)
        _add(made)
        setattr(build, _ATTRIBUTE, made)
        return build

    return decorate


def _add(family: Family) -> None:
    if lacking := sorted(getattr(family.build, "__abstractmethods__", ())):
        raise FamilyError(f"{family.name} does not define {', '.join(lacking)}, which a dig.layers.Backbone must")
    if getattr(family.build, "__module__", "") not in discovery.modules():
        # First: whoever takes a declared family's name is told, not the one who declares it.
        discovery.load_declared()
    known = _families.get(family.name)
    # A module that is imported again, as __mp_main__ in a worker, brings the same family anew.
    if known is not None and known != family and _origin(known) != _origin(family):
        raise FamilyError(f"two families are called {family.name}: of {_origin(known)} and of {_origin(family)}")
    _families[family.name] = family


def _origin(family: Family) -> str:
    module = getattr(family.build, "__module__", "?").replace("__mp_main__", "__main__")
    return f"{module}.{getattr(family.build, '__qualname__', '?')}"


def families() -> Mapping[str, Family]:
    """Every family by name: this project's own first, then other packages', then what was registered since."""
    discovery.load_declared()
    return MappingProxyType(_families)


def find_family(name: str) -> Family:
    """The family of this name, or `UnknownModelError` with the closest one."""
    known = families()
    if name not in known:
        broken = "".join(f"; {words}" for words in discovery.broken())
        raise UnknownModelError(f"unknown model {name!r}: {closest(name, known)}{broken}")
    return known[name]


def load_family(path: str) -> Family:
    """The family at an import path, ``my_package.my_module:MyFamily``, registered under its name.

    What is there is a `Family`, or a class or function that `register` decorates.

    Raises:
        FamilyError: No such module or name, its import failed, or it is no family.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise FamilyError(f"no module {missing!r} for {path}; is its folder on PYTHONPATH?") from None
        said = (str(error).splitlines() or [""])[0]
        raise FamilyError(f"importing {module_name} for {path} raised {type(error).__name__}: {said}") from None
    if not hasattr(module, attribute):
        known = [name for name, value in vars(module).items() if _family_of(value) is not None]
        hint = f"; its families: {', '.join(known)}" if known else ""
        raise FamilyError(f"{module_name} has no {attribute!r}{hint}")
    family = _family_of(getattr(module, attribute))
    if family is None:
        raise FamilyError(f"{path} is no family: give a dig.registry.Family, or decorate it with dig.registry.register")
    if families().get(family.name) is not family:
        _add(family)
    if module_name not in discovery.modules():
        _sources[family.name] = path
    return family


def _family_of(value: object) -> Family | None:
    found = value if isinstance(value, Family) else getattr(value, _ATTRIBUTE, None)
    return found if isinstance(found, Family) else None


def source_of(family: str) -> str:
    """The import path that a family was asked for by; empty where its name is enough for another process."""
    return _sources.get(family, "")


def load_source(source: str) -> None:
    """`load_family` of a path that `source_of` gave in another process; nothing of an empty one."""
    if source:
        load_family(source)


def model_name(family: str, size: str, patch: int) -> str:
    """``DiG-S/2``, checked."""
    known = find_family(family)
    if size not in known.sizes:
        raise UnknownModelError(f"unknown size {size!r} of {family}: {closest(size, known.sizes)}")
    if patch not in PATCHES:
        raise UnknownModelError(f"unknown patch size {patch}: choose one of {', '.join(map(str, PATCHES))}")
    return f"{family}-{size}/{patch}"


def parse_name(name: str) -> tuple[Family, str, int]:
    """``DiG-S/2`` to its family, size and patch.

    Raises:
        UnknownModelError: No such model; the message offers the closest one.
    """
    if not isinstance(name, str):
        raise UnknownModelError(f"a model is named by a word, 'DiG-S/2' say; got {name!r:.80}")
    match = re.fullmatch(r"(.+)-([^-/]+)/(\d+)", name)
    if match is None:
        near = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.3) or ["DiG-S/2"]
        raise UnknownModelError(f"{name!r} is not a model name: it is family-size/patch; did you mean {near[0]}?")
    family, size, patch = match.groups()
    model_name(family, size, int(patch))
    return find_family(family), size, int(patch)


def parse_family(text: str, *, sized: bool) -> tuple[Family, str, dict[str, str]]:
    """What a command line's words name: ``DiG:fla:variant=release``, ``DiG-S/2:fla``, ``my_module:MyFamily-S/2``.

    Args:
        text: As above.
        sized: Whether a model is meant, with size and patch, rather than a family.

    Returns:
        The family; what stands after its name, ``-S/2``, or nothing; the options that are named.

    Raises:
        UnknownModelError: No such family, option or word.
        FamilyError: An import path without a family.
    """
    first, *words = text.strip().split(":")
    if _is_module(first) and words:
        attribute, dash, size = words[0].partition("-")
        family, rest, words = load_family(f"{first}:{attribute}"), dash + size, words[1:]
    else:
        name = parse_name(first)[0].name if sized or (first not in families() and "/" in first) else first
        family, rest = find_family(name), first.removeprefix(name)
    return family, rest, family.read_words(words)


def _is_module(word: str) -> bool:
    """Whether the first of several words is a module rather than a family's name, well or badly written."""
    if word in families() or not all(part.isidentifier() for part in word.split(".")):
        return False
    similar = {name.lower() for name in families()}
    return "." in word or (word.lower() not in similar and is_installed(word))


def parse_model(text: str, device: str) -> tuple[str, dict[str, str], str]:
    """A model with its options as a command line names it, ready to run on a device (``cuda`` or ``cpu``).

    All of the family's options are in the answer, defaults too, so that an option that was named and one that is the
    default are the same. The backend, left out of the text, is the one for the device.

    Returns:
        The model's name, its options, and the family's import path where it was named by that.

    Raises:
        ValueError: No such model, option or word, or a backend that this device can't run.
        MissingPackageError: Its package is not installed.
    """
    family, rest, given = parse_family(text, sized=True)
    name = f"{family.name}{rest}"
    parse_name(name)
    options = {option: words[0] for option, words in family.options.items()}
    if family.backends:
        options[BACKEND] = family.default_backend(device)
    options |= given
    family.require_device(options, device)
    if message := family.missing_packages(options):
        raise MissingPackageError(message)
    return name, options, source_of(family.name)


def reference_model(name: str, options: Mapping[str, str]) -> tuple[str, dict[str, str]] | None:
    """Name and options of the model that this one must agree with; its own for a reference, None where there is none.

    Raises:
        UnknownModelError: The family names a reference that does not exist.
    """
    family, size, patch = parse_name(name)
    if family.reference is None:
        return None
    first, *words = family.reference.split(":")
    if first != family.name:
        return model_name(first, size, patch), find_family(first).read_words(words)
    twin = {**options, **family.read_words(words)}
    return name, dict(options) if family.backend_of(twin) == family.backend_of(options) else twin


def list_models() -> list[str]:
    """Every model name."""
    return [f"{f.name}-{size}/{patch}" for f in families().values() for size in f.sizes for patch in PATCHES]


def list_variants() -> list[tuple[str, dict[str, str]]]:
    """Every (name, options) whose weights differ in name or shape; a family with another's weights is left out."""
    found: list[tuple[str, dict[str, str]]] = []
    for family in families().values():
        if family.reference is not None and family.reference.partition(":")[0] != family.name:
            continue
        choices: list[dict[str, str]] = [{}]
        for option in family.reshaped_by:
            choices = [{**choice, option: word} for choice in choices for word in family.options[option]]
        names = [f"{family.name}-{size}/{patch}" for size in family.sizes for patch in PATCHES]
        found += [(name, choice) for name in names for choice in choices]
    return found
