"""A model by name, with all that it is built from: `create_model`, and `ModelSpec`, which is how one is written down.

Names, options and sizes are checked before torch is imported. Shapes: C channels, H rows, W columns of a model's input.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dig.family import BACKEND, FamilyError
from dig.registry import load_source, parse_name, reference_model

if TYPE_CHECKING:
    import torch

    from dig.layers import Backbone

VAE_FACTOR = 8
"""Pixels of the image to one cell of its latent, along each side."""


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
