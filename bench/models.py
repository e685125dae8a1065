"""Models by name: ``create_model("DiG-S/2", image_size=256)``. The one place that knows which models exist.

Importing this module does not import torch: names and options are checked before any of that starts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dig.packages import is_installed, missing_message

if TYPE_CHECKING:
    import torch

    from dig.layers import Backbone

PATCHES = (2, 4, 8)
VAE_FACTOR = 8
"""Pixels of the image to one cell of its latent, along each side."""


class UnknownModelError(ValueError):
    """No such model, size, patch or option; the message offers the closest one that exists."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        name: ``DiG``.
        sizes: In growing order.
        assumed: Those of the sizes that nobody published.
        options: Name → the values it takes. The first value is the default, and runs anywhere.
        implementation: The option that says which kernel runs the family's heart.
        packages: Value of that option → the import names of the packages it needs.
        gpu_only: Values of that option that need an NVIDIA GPU.
        on_gpu: Its default on a GPU, where that is not the first value; see `default_implementation`.
        build: (size, shared configuration fields, options) to the model.
    """

    name: str
    sizes: tuple[str, ...]
    assumed: frozenset[str] = frozenset()
    options: Mapping[str, tuple[str, ...]]
    implementation: str
    packages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gpu_only: frozenset[str] = frozenset()
    on_gpu: str | None = None
    build: Callable[[str, dict[str, Any], dict[str, str]], Backbone]


def _build_dig(size: str, shape: dict[str, Any], options: dict[str, str]) -> Backbone:
    from dig.model import SIZES, DiG, DiGConfig, heads_of

    options = {"backend" if name == "recurrence" else name: value for name, value in options.items()}
    depth, width, _ = SIZES[size]
    heads = heads_of(size, "release" if options.get("variant") == "release" else "paper")
    return DiG(DiGConfig(depth=depth, width=width, heads=heads, **shape, **options))  # type: ignore[arg-type]


def _build_dit(size: str, shape: dict[str, Any], options: dict[str, str]) -> Backbone:
    from baselines.dit import SIZES, DiT, DiTConfig

    depth, width, heads = SIZES[size]
    return DiT(DiTConfig(depth=depth, width=width, heads=heads, **shape, **options))  # type: ignore[arg-type]


def _build_dis(size: str, shape: dict[str, Any], options: dict[str, str]) -> Backbone:
    from baselines.dis import SIZES, DiS, DiSConfig

    depth, width = SIZES[size]
    return DiS(DiSConfig(depth=depth, width=width, **shape, **options))  # type: ignore[arg-type]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="DiG",
            sizes=("S", "B", "L", "XL"),
            options={
                "recurrence": ("reference", "fla", "triton"),
                "variant": ("paper", "release"),
                "scan": ("crisscross", "bidirectional", "causal"),
                "convolution": ("identity-init", "default-init", "none"),
            },
            implementation="recurrence",
            packages={"fla": ("fla",), "triton": ("triton",)},
            gpu_only=frozenset({"fla", "triton"}),
            on_gpu="triton",
            build=_build_dig,
        ),
        Family(
            name="DiT",
            sizes=("S", "B", "L", "XL"),
            options={"attention": ("materialized",)},
            implementation="attention",
            build=_build_dit,
        ),
        Family(
            name="Flash-DiT",
            sizes=("S", "B", "L", "XL"),
            options={"attention": ("sdpa-flash", "sdpa-cudnn", "flash-attn")},
            implementation="attention",
            packages={"flash-attn": ("flash_attn",)},
            gpu_only=frozenset({"sdpa-cudnn", "flash-attn"}),
            build=_build_dit,
        ),
        Family(
            name="DiS",
            sizes=("S", "B", "M", "L", "XL", "H"),
            assumed=frozenset({"XL"}),
            options={"mixer": ("reference", "mamba-ssm")},
            implementation="mixer",
            packages={"mamba-ssm": ("mamba_ssm", "causal_conv1d")},
            gpu_only=frozenset({"mamba-ssm"}),
            on_gpu="mamba-ssm",
            build=_build_dis,
        ),
    )
}


def closest(value: str, choices: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """The end of a message about a wrong name: the closest right one, and all of them."""
    folded = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(value.lower(), list(folded), n=1, cutoff=0.4)
    hint = f"did you mean {folded[near[0]]}? " if near else ""
    return f"{hint}Known: {', '.join(choices)}"


def find_family(name: str) -> Family:
    """The family of this name, or `UnknownModelError` with the closest one."""
    if name not in FAMILIES:
        raise UnknownModelError(f"unknown model {name!r}: {closest(name, FAMILIES)}")
    return FAMILIES[name]


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
    match = re.fullmatch(r"(.+)-([^-/]+)/(\d+)", name)
    if match is None:
        near = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.3) or ["DiG-S/2"]
        raise UnknownModelError(f"{name!r} is not a model name: it is family-size/patch; did you mean {near[0]}?")
    family, size, patch = match.groups()
    model_name(family, size, int(patch))
    return FAMILIES[family], size, int(patch)


def check_options(family: Family, options: Mapping[str, str]) -> None:
    """Raise `UnknownModelError` unless every option and its value exist in the family."""
    for name, value in options.items():
        if name not in family.options:
            raise UnknownModelError(f"unknown option {name!r} of {family.name}: {closest(name, family.options)}")
        if value not in family.options[name]:
            raise UnknownModelError(
                f"unknown {name} {value!r} of {family.name}: {closest(value, family.options[name])}"
            )


def default_implementation(family: Family, device: str) -> str:
    """What runs on a device (``cuda`` or ``cpu``) unless something else is named."""
    if device == "cuda" and family.on_gpu is not None:
        return family.on_gpu
    return family.options[family.implementation][0]


def implementation_of(family: Family, options: Mapping[str, str]) -> str:
    """The value that the family's implementation option takes."""
    return options.get(family.implementation, family.options[family.implementation][0])


def missing_packages(family: Family, options: Mapping[str, str]) -> str | None:
    """What to install before this family runs with these options, as one line, or None."""
    value = implementation_of(family, options)
    for module in family.packages.get(value, ()):
        if not is_installed(module):
            return missing_message(module, f"{family.name} with {family.implementation}={value}")
    return None


def list_models() -> list[str]:
    """Every model name."""
    return [f"{f.name}-{size}/{patch}" for f in FAMILIES.values() for size in f.sizes for patch in PATCHES]


def create_model(
    name: str,
    *,
    image_size: int | None = None,
    input_size: tuple[int, int] | None = None,
    num_classes: int = 1000,
    in_channels: int = 4,
    device: torch.device | str | None = None,
    **options: str,
) -> Backbone:
    """Build a model by name, with fresh weights.

    Args:
        name: Family, size and patch: ``DiG-XL/2``, ``Flash-DiT-B/4``; `list_models` has them all.
        image_size: Side of the square image in pixels, of which the latent is an eighth. Give this or input_size.
        input_size: (height, width) of the model's input: any grid, or pixels themselves.
        num_classes: Labels; the null label of guidance comes on top.
        in_channels: Channels of the input.
        device: Where the model goes, and what decides on its implementation if none is named: DiG's own kernels on a
            GPU. None leaves it where it is made, with the implementation that runs on any device.
        **options: Of the family, each a word: DiG's recurrence, variant, scan and convolution, DiT's and Flash-DiT's
            attention, DiS's mixer. Their values are in `FAMILIES`.

    Returns:
        The module; its ``forward(x, t, y)`` takes x (B, in_channels, height, width), t (B,) and y (B,) int64, and gives
        (B, 2·in_channels, height, width).

    Raises:
        UnknownModelError: No such model or option.
        ValueError: The sizes do not fit.
        MissingPackageError: The implementation's package is not installed.
    """
    family, size, patch = parse_name(name)
    check_options(family, options)
    if (image_size is None) == (input_size is None):
        raise ValueError("give either image_size (pixels, through a VAE) or input_size ((height, width) of the input)")
    if image_size is not None:
        check_resolution(image_size, patch)
        input_size = (image_size // VAE_FACTOR, image_size // VAE_FACTOR)
    kind = str(device).partition(":")[0]
    options.setdefault(family.implementation, default_implementation(family, kind))
    shape = {"input_size": input_size, "in_channels": in_channels, "num_classes": num_classes, "patch_size": patch}
    model = family.build(size, shape, options)
    return model if device is None else model.to(device)


def check_resolution(resolution: int, patch: int) -> None:
    """Raise ValueError unless the image's latent divides into patches."""
    step = VAE_FACTOR * patch
    if resolution < step or resolution % step:
        near = max(step, round(resolution / step) * step)
        raise ValueError(
            f"resolution {resolution} is not a multiple of {step} (8 pixels a latent cell, {patch} cells a patch); "
            f"the closest that is: {near}"
        )
