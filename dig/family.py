"""What a family of models says of itself. No torch here; `dig.registry` keeps the families."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from dig.fields import fits
from dig.packages import is_installed, missing_message

if TYPE_CHECKING:
    from dig.layers import Backbone
    from dig.operation import Operation

BACKEND = "backend"
"""The option that says which implementation runs the family's heart, by one name in every family that has several."""
_GIVEN = ("size", "input_size", "in_channels", "num_classes", "patch_size", "image_size", "device", "name")
"""Arguments of a builder and of `dig.spec.create_model`, which no option can be called by."""
_WORD = re.compile(r"[\w.+-]+")
"""Of an option: what stands between colons on a command line."""

MARKERS = "ov^<>8sp*hHDdPX"
"""Filled markers of matplotlib."""


class UnknownModelError(ValueError):
    """No such model, size, patch or option; the message offers the closest one that exists."""


class FamilyError(ValueError):
    """A family cannot be had, or is no family; the message is one line."""


NEAR = 0.6
"""How alike names are of which one may be meant for the other, 0 to 1; below, a hint is a riddle."""


def nearest(value: str, choices: Mapping[str, Any] | Sequence[str]) -> str | None:
    """The one among these that a wrong name is likely to stand for; None where none is near."""
    folded = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(value).lower(), list(folded), n=1, cutoff=NEAR)
    return folded[near[0]] if near else None


def closest(value: str, choices: Mapping[str, Any] | Sequence[str]) -> str:
    """The end of a message about a wrong name: the closest right one, and all of them."""
    near = nearest(value, choices)
    return f"{f'did you mean {near}? ' if near is not None else ''}Known: {', '.join(choices)}"


def _check_types(said: Any, owner: str) -> None:
    """Raise FamilyError where a field is of another type than it is annotated with. A list does for a tuple."""
    hints = get_type_hints(type(said), localns={"Backbone": object, "Operation": object})
    for entry in fields(said):
        value = getattr(said, entry.name)
        if not fits(value, hints[entry.name]):
            # Without its comma a tuple of one is a word.
            comma = f"; of one it is ({value!r},)" if isinstance(value, str) and "tuple" in str(entry.type) else ""
            raise FamilyError(f"{entry.name} of {owner} must be {entry.type}; got {value!r:.80}{comma}")
        if isinstance(value, list):
            object.__setattr__(said, entry.name, tuple(value))


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Kernels by which an implementation is known: one that is ``expected`` must run in a step, none that is foreign.

    Kernels of the forward pass only: they run in a training step too.

    Attributes:
        expected: A regular expression, searched for in kernels' names as the profiler gives them.
        foreign: The same, of kernels that show that something else ran.
        kernels_in: A package or module instead of ``expected``: the names of all Triton kernels in it, which it must
            have imported by the time the step has run, and which end in ``_kernel``.
    """

    expected: str = r"(?!)"
    foreign: str = r"(?!)"
    kernels_in: str = ""

    def __post_init__(self) -> None:
        """Raise FamilyError on what is no regular expression."""
        _check_types(self, "Signature")
        for name in ("expected", "foreign"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise FamilyError(f"{name} of a Signature is no regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a family appears in figures. What is left out is chosen so that lines can be told apart.

    Attributes:
        label: Its name there, if not the family's own.
        colors: Of its series, the first one's first: ``#D55E00``.
        markers: Likewise, one of matplotlib's letters for a filled marker each.
        dashes: Likewise: ``"-"``, or matplotlib's (offset, lengths).
        width: Of the first series' line, in points.
    """

    label: str = ""
    colors: tuple[str, ...] = ()
    markers: str = ""
    dashes: tuple[Any, ...] = ()
    width: float = 1.5

    def __post_init__(self) -> None:
        """Raise FamilyError on what cannot be drawn: a figure must not fail for it later."""
        _check_types(self, "Look")
        if wrong := [color for color in self.colors if not re.fullmatch(r"#[0-9A-Fa-f]{6}", color)]:
            raise FamilyError(f"a colour is written #RRGGBB; got {wrong[0]!r}")
        if wrong := [marker for marker in self.markers if marker not in MARKERS]:
            raise FamilyError(f"a marker is one of {MARKERS}; got {wrong[0]!r}")
        for pattern in self.dashes:
            lengths = (0, (1, 1)) if pattern == "-" else pattern
            if not (isinstance(lengths, tuple | list) and len(lengths) == 2 and isinstance(lengths[1], tuple | list)):
                raise FamilyError(f"dashes are '-' or (offset, lengths), (0, (4, 1)) say; got {pattern!r}")
            if not lengths[1] or not all(isinstance(x, int | float) and x > 0 for x in lengths[1]):
                raise FamilyError(f"lengths of dashes are positive numbers; got {pattern!r}")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: everything that commands, the benchmark and figures have to know of it.

    Attributes:
        name: ``DiG``. Models are called ``DiG-S/2``: family, size, patch.
        sizes: In growing order.
        build: ``build(size, input_size=, in_channels=, num_classes=, patch_size=, **options)`` makes a
            `dig.layers.Backbone` with fresh weights. It imports what is heavy itself.
        options: Name → the words it takes, the default first. `BACKEND` is the implementation's, and its first value
            runs anywhere; a family with one implementation does without.
        assumed: Those of the sizes that nobody published.
        renamed: Options' former names → today's; both are read.
        packages: Backend → the import names of the packages that it needs; ``""`` of a family without backends.
        gpu_only: Backends that need an NVIDIA GPU.
        on_gpu: The backend that is taken on a GPU where none is named, if not the first.
        reference: What the outputs and gradients must agree with, weights being the same: a family that takes the same
            weights (``DiT``), or one of the family's own backends (``DiG:reference``). None: nothing computes the same,
            which every row then says.
        signatures: (``cuda`` or ``cpu``, backend) → the kernels that show it at work. Rows without are marked
            unverified, but those of the reference itself, which is plain operations.
        operation: ``operation(model, batch, dtype)`` is what the backend's kernels compute, alone, at the model's own
            shape, with a truth beside it (`dig.operation`): what an error at that shape is found by. Without it rows
            say that only a small input was compared.
        cast: Whether its models run after ``model.to(torch.bfloat16)`` without autocast, as accurately as with it:
            `python -m dig sample` then casts weights once on a GPU.
        tunes: Backends whose kernels tune themselves for minutes when they first run: suites measure them last.
        reshaped_by: Options that change the names or shapes of weights: what checkpoints are searched by.
        look: In figures.
        files: Source files and folders that decide on its numbers, beside the module or package that ``build`` is
            from: a row whose files have changed since is measured again.
    """

    name: str
    sizes: tuple[str, ...]
    build: Callable[..., Backbone]
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    assumed: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gpu_only: frozenset[str] = frozenset()
    on_gpu: str | None = None
    reference: str | None = None
    signatures: Mapping[tuple[str, str], Signature] = field(default_factory=dict)
    operation: Callable[..., Operation] | None = None
    cast: bool = False
    tunes: frozenset[str] = frozenset()
    reshaped_by: tuple[str, ...] = ()
    look: Look | None = None
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise FamilyError on what no family can be; the message names family and field, and says what to write."""
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z][\w.+-]*", self.name):
            raise FamilyError(f"a family's name is letters, digits, '-', '.', '+' and '_'; got {self.name!r}")
        for option, words in self.options.items() if isinstance(self.options, Mapping) else ():
            if not isinstance(words, tuple) or not words:
                raise FamilyError(f"option {option!r} of {self.name} needs a tuple of words; got {words!r}")
        _check_types(self, self.name)
        if not self.sizes or not all(re.fullmatch(r"[\w.+]+", size) for size in self.sizes):
            raise FamilyError(
                f"{self.name} needs sizes such as ('S', 'B'), of letters, digits, '_', '.' and '+', without '-' and "
                f"'/'; got {self.sizes!r}"
            )
        self._check_once("sizes", self.sizes)
        self._check_known("assumed", self.assumed, self.sizes, "size")
        self._check_options()
        backends = self.backends or ("",)
        on_gpu = () if self.on_gpu is None else (self.on_gpu,)
        signed = [backend for _, backend in self.signatures]
        self._check_known("packages", self.packages, backends, "backend")
        self._check_known("gpu_only", self.gpu_only, backends, "backend")
        self._check_known("tunes", self.tunes, backends, "backend")
        self._check_known("on_gpu", on_gpu, backends, "backend")
        self._check_known("signatures", signed, backends, "backend")
        self._check_known("signatures", [device for device, _ in self.signatures], ("cuda", "cpu"), "device")
        self._check_known("reshaped_by", self.reshaped_by, tuple(self.options), "option")
        first, *chosen = (self.reference or self.name).split(":")
        if first == self.name:
            try:
                self.read_words(chosen)
            except UnknownModelError as error:
                raise FamilyError(f"reference of {self.name}: {error}") from None

    def _check_options(self) -> None:
        for option, words in self.options.items():
            if not option.isidentifier() or option in _GIVEN:
                why = "every builder is given that already" if option in _GIVEN else "it is a name in Python"
                raise FamilyError(f"{self.name} cannot call an option {option!r}: {why}")
            if wrong := [word for word in words if not _WORD.fullmatch(word)]:
                raise FamilyError(
                    f"a word of option {option!r} of {self.name} is letters, digits, '-', '.', '+' and '_'; got "
                    f"{wrong[0]!r}"
                )
            self._check_once(f"option {option!r}", words)
        self._check_known("renamed", self.renamed.values(), tuple(self.options), "option")

    def _check_once(self, name: str, words: Sequence[str]) -> None:
        if twice := [word for word in words if list(words).count(word) > 1]:
            raise FamilyError(f"{name} of {self.name} has {twice[0]!r} twice")

    def _check_known(self, name: str, named: Iterable[str], known: Sequence[str], kind: str) -> None:
        """Raise FamilyError where a field names what the family has not."""
        if alien := sorted(set(named) - set(known)):
            has = f"it has {', '.join(map(repr, known))}" if known else "it has none"
            raise FamilyError(f"{name} of {self.name}: {self.name} has no {kind} {alien[0]!r}; {has}")

    @property
    def backends(self) -> tuple[str, ...]:
        """The implementations, the default first; empty where there is one without a name."""
        return self.options.get(BACKEND, ())

    @property
    def runs_on_cpu(self) -> tuple[str, ...]:
        """The backends that need no GPU."""
        return tuple(word for word in self.backends if word not in self.gpu_only)

    def default_backend(self, device: str) -> str:
        """What runs on a device (``cuda`` or ``cpu``) unless something else is named; empty without backends."""
        if device == "cuda" and self.on_gpu is not None:
            return self.on_gpu
        return self.backends[0] if self.backends else ""

    def backend_of(self, options: Mapping[str, str]) -> str:
        """The backend that these options choose."""
        return options.get(BACKEND, self.default_backend("cpu"))

    def read_options(self, options: Mapping[str, object]) -> dict[str, str]:
        """Options by today's names, checked.

        Raises:
            UnknownModelError: No such option or word, or one option by its former and its present name.
        """
        read: dict[str, str] = {}
        for name, value in options.items():
            option = self.renamed.get(name, name)
            if option not in self.options:
                former = difflib.get_close_matches(name, self.renamed, n=1)
                meant = self.renamed[former[0]] if former else name
                raise UnknownModelError(f"unknown option {name!r} of {self.name}: {closest(meant, self.options)}")
            if not isinstance(value, str):
                words = ", ".join(map(repr, self.options[option]))
                raise UnknownModelError(f"{option} of {self.name} is one of the words {words}; got {value!r:.80}")
            if value not in self.options[option]:
                known = closest(value, self.options[option])
                raise UnknownModelError(f"unknown {option} {value!r} of {self.name}: {known}")
            if read.get(option, value) != value:
                raise UnknownModelError(f"{self.name} is given {option} twice: {read[option]} and {value}")
            read[option] = value
        return read

    def read_words(self, words: Sequence[str]) -> dict[str, str]:
        """`read_options` of words as after a colon: ``variant=release``, or a backend alone."""
        options: dict[str, str] = {}
        for word in words:
            key, separator, value = word.partition("=")
            if not separator and not self.backends:
                raise UnknownModelError(f"{self.name} has no backends to choose from; got {word!r}")
            name, chosen = (key, value) if separator else (BACKEND, word)
            if options.setdefault(name, chosen) != chosen:
                raise UnknownModelError(f"{self.name} is given {name} twice: {options[name]} and {chosen}")
        return self.read_options(options)

    def missing_packages(self, options: Mapping[str, str]) -> str | None:
        """What to install before this family runs with these options, as one line, or None."""
        backend = self.backend_of(options)
        for module in self.packages.get(backend, ()):
            if not is_installed(module):
                return missing_message(module, f"{self.name} with {BACKEND}={backend}" if backend else self.name)
        return None

    def require_device(self, options: Mapping[str, str], device: str) -> None:
        """Raise ValueError where these options need a GPU and the device is a CPU."""
        if device == "cpu" and self.backend_of(options) in self.gpu_only:
            chosen, runs = self.backend_of(options), " or ".join(self.runs_on_cpu)
            needs = (
                f"{self.name} with {BACKEND}={chosen} needs an NVIDIA GPU"
                if chosen
                else f"{self.name} needs an NVIDIA GPU"
            )
            raise ValueError(f"{needs}; {self.name} runs on a CPU with {runs} only" if runs else needs)
