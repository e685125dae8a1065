"""Models by name: families are registered here, and whoever needs a model asks here. Nothing lies below this.

Families come from three places: `dig.discovery` finds those that packages declare (this project's own among them); a
script registers its own with `register`; and ``my_package.my_module:MyFamily`` on a command line names one by its
import path. Importing this module imports no torch, nor does finding a family of this project: names and options are
checked before any of that starts. What is heavy is imported when a model is built.

Shapes: C channels, H rows, W columns of a model's input.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from dig import discovery
from dig.family import BACKEND, Family, FamilyError, UnknownModelError, closest
from dig.packages import MissingPackageError, is_installed

if TYPE_CHECKING:
    import torch

    from dig.layers import Backbone

T = TypeVar("T")

PATCHES = (2, 4, 8)
VAE_FACTOR = 8
"""Pixels of the image to one cell of its latent, along each side."""
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
        FamilyError: Another family has this name, or this is none; the message names family and field.
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


def check_resolution(resolution: int, patch: int) -> None:
    """Raise ValueError unless the image's latent divides into patches."""
    step = VAE_FACTOR * patch
    if resolution < step or resolution % step:
        near = max(step, round(resolution / step) * step)
        raise ValueError(
            f"resolution {resolution} is not a multiple of {step} (8 pixels a latent cell, {patch} cells a patch); "
            f"the closest that is: {near}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that a model is built from but its weights.

    Attributes:
        name: Family, size and patch: ``DiG-S/2``.
        options: The family's, each a word: ``{"backend": "triton", "variant": "paper"}``; former names are read too.
        input_size: (H, W).
        in_channels: C.
        num_classes: Labels; the null label comes on top.
        source: The family's import path, where no installed package declares it; see `load_family`.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    input_size: tuple[int, int]
    in_channels: int
    num_classes: int
    source: str = ""

    def __post_init__(self) -> None:
        """Take the size as JSON gives it, and the options by today's names, in one order.

        Raises:
            ValueError: No such model, option or word.
        """
        load_source(self.source)
        options = parse_name(self.name)[0].read_options(self.options)
        object.__setattr__(self, "input_size", tuple(self.input_size))
        object.__setattr__(self, "options", dict(sorted(options.items())))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.in_channels, *self.input_size)

    def describe(self) -> str:
        """``DiG-S/2 (backend=triton), input 1x32x32, 10 classes``."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        shape = "x".join(map(str, self.sample_shape))
        return f"{self.name}{f' ({options})' if options else ''}, input {shape}, {self.num_classes} classes"

    def reference(self) -> ModelSpec:
        """The model that this one must agree with, of the same weights; itself where there is none."""
        found = reference_model(self.name, self.options)
        return self if found is None else replace(self, name=found[0], options=found[1])

    def build(self) -> Backbone:
        """The model, with fresh weights."""
        return create_model(
            self.name,
            input_size=self.input_size,
            in_channels=self.in_channels,
            num_classes=self.num_classes,
            **dict[str, Any](self.options),
        )


def _whole(name: str, value: object) -> int:
    """A whole number of any kind, numpy's too, as Python's."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a whole number; got {value!r:.80}") from None


def _pair(size: object) -> tuple[int, int]:
    """An input size as (height, width)."""
    if not isinstance(size, list | tuple):
        side = _whole("input_size, if it is not (height, width),", size)
        return side, side
    if len(size) != 2:
        raise TypeError(f"input_size must be (height, width), or a square's side; got {size!r:.80}")
    return _whole("height in input_size", size[0]), _whole("width in input_size", size[1])


def create_model(
    name: str,
    *,
    image_size: int | None = None,
    input_size: tuple[int, int] | int | None = None,
    num_classes: int = 1000,
    in_channels: int = 4,
    device: torch.device | str | None = None,
    **options: str,
) -> Backbone:
    """Build a model by name, with fresh weights.

    Args:
        name: Family, size and patch: ``DiG-XL/2``, ``Flash-DiT-B/4``; `list_models` has them all.
        image_size: Side of the square image in pixels, of which the latent is an eighth. Give this or input_size.
        input_size: (height, width) of the model's input: any grid, or pixels themselves; a number is a square's side.
        num_classes: Labels; the null label of guidance comes on top.
        in_channels: Channels of the input.
        device: Where the model goes, and what decides on its backend if none is named: DiG's own kernels on a GPU.
            None leaves it where it is made, with the backend that runs on any device.
        **options: Of the family, each a word: ``backend``, and DiG's variant, scan and convolution; `families` has
            them all with their words. A backend's former names (DiG's recurrence, DiT's attention, DiS' mixer) are
            read too.

    Returns:
        The module; its ``forward(x, t, y)`` takes x (B, in_channels, height, width), t (B,) and y (B,) int64, and gives
        (B, 2·in_channels, height, width).

    Raises:
        UnknownModelError: No such model or option.
        ValueError: The sizes do not fit.
        MissingPackageError: The backend's package is not installed.
        TypeError: A size or count is no whole number.
        FamilyError: What the family builds is no `dig.layers.Backbone`.
    """
    family, size, patch = parse_name(name)
    chosen = family.read_options(options)
    num_classes, in_channels = _whole("num_classes", num_classes), _whole("in_channels", in_channels)
    if (image_size is None) == (input_size is None):
        raise ValueError("give either image_size (pixels, through a VAE) or input_size ((height, width) of the input)")
    if image_size is not None:
        image_size = _whole("image_size", image_size)
        check_resolution(image_size, patch)
        input_size = (image_size // VAE_FACTOR, image_size // VAE_FACTOR)
    else:
        input_size = _pair(input_size)
    if family.backends:
        chosen.setdefault(BACKEND, family.default_backend(str(device).partition(":")[0]))
    shape = {"input_size": input_size, "in_channels": in_channels, "num_classes": num_classes, "patch_size": patch}
    model = family.build(size, **shape, **chosen)
    from dig.layers import Backbone

    if not isinstance(model, Backbone):
        raise FamilyError(f"{family.name} builds a {type(model).__name__}, which is no dig.layers.Backbone")
    return model if device is None else model.to(device)
