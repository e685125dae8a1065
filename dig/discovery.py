"""Which modules register families: those that packages declare under the entry points ``dig.models``.

A package says so in its pyproject.toml, this project like any other::

    [project.entry-points."dig.models"]
    my_package = "my_package.families"

The module is imported once a family is asked for, and registers what it has. Of this project the declaration is also
read from the pyproject.toml beside the package, because it runs from a checkout that nobody installed, too.
"""

from __future__ import annotations

import functools
import importlib
import tomllib
from importlib import metadata
from pathlib import Path

GROUP = "dig.models"
_DISTRIBUTION = "dig-diffusion"

_asked: set[str] = set()
_broken: list[str] = []


def _own() -> dict[str, str]:
    """This project's entry points, from its checkout or its installation."""
    path = Path(__file__).resolve().parents[1] / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        project = {}
    if project.get("name") == _DISTRIBUTION:
        return dict(project.get("entry-points", {}).get(GROUP, {}))
    try:
        found = metadata.distribution(_DISTRIBUTION).entry_points
    except metadata.PackageNotFoundError:
        return {}
    return {point.name: point.value for point in found if point.group == GROUP}


@functools.cache
def modules() -> tuple[str, ...]:
    """The modules in the order in which they are imported: this project's as declared, then the others' by name."""
    others = sorted((point.name, point.value) for point in metadata.entry_points(group=GROUP))
    values = [*_own().values(), *(value for _, value in others)]
    return tuple(dict.fromkeys(value.partition(":")[0].strip() for value in values))


def load_declared() -> None:
    """Import every module that declares families, once. One that cannot be imported is remembered (`broken`)."""
    for module in modules():
        if module in _asked:
            continue
        _asked.add(module)  # First: a module may ask for models itself.
        try:
            importlib.import_module(module)
        except Exception as error:
            # Somebody's package that is broken must not keep everybody else's models from running.
            said = (str(error).splitlines() or [""])[0]
            _broken.append(f"{module}, which declares models, raised {type(error).__name__}: {said}")


def broken() -> tuple[str, ...]:
    """A line for each module that could not be imported."""
    return tuple(_broken)
