"""What training and sampling know of models by name: functions that are handed in.

The one place that knows which models exist imports DiG and the baselines, so nothing here may import it;
`dig.__main__` joins the two.

Shapes: C channels, H rows, W columns of a model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dig.layers import Backbone


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that a model is built from but its weights.

    Attributes:
        name: Family, size and patch: ``DiG-S/2``.
        options: The family's, each a word: ``{"recurrence": "triton", "variant": "paper"}``.
        input_size: (H, W).
        in_channels: C.
        num_classes: Labels; the null label comes on top.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    input_size: tuple[int, int]
    in_channels: int
    num_classes: int

    def __post_init__(self) -> None:
        """Take the size as JSON gives it, and the options in one order."""
        object.__setattr__(self, "input_size", tuple(self.input_size))
        object.__setattr__(self, "options", dict(sorted(self.options.items())))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.in_channels, *self.input_size)

    def describe(self) -> str:
        """``DiG-S/2 (recurrence=triton), input 1x32x32, 10 classes``."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        shape = "x".join(map(str, self.sample_shape))
        return f"{self.name}{f' ({options})' if options else ''}, input {shape}, {self.num_classes} classes"


@dataclass(frozen=True, kw_only=True)
class Registry:
    """Models by name, and what is known of their cost.

    Attributes:
        create: (name, input_size=, in_channels=, num_classes=, **options) to a model with fresh weights. Raises
            ValueError on what no model can have.
        parse: (text, device) to name and options: ``DiG-S/2:triton:variant=release`` on ``cuda`` or ``cpu``. All of
            the family's options are among them, defaults too; the implementation, left out of the text, is the one
            for the device. Raises ValueError on an unknown name, option or value, and on an implementation that this
            device can't run.
        implementation: Model name to the option that chooses its implementation, which changes no weight.
        variants: Every (name, options) whose weights differ in name or shape.
        macs: Multiply-adds of a forward pass for one image.
        ceiling: (device, dtype) to the FLOP/s of a large matrix product, measured when called.
        environment: Versions and hardware, for the record of a run.
    """

    create: Callable[..., Backbone]
    parse: Callable[[str, str], tuple[str, dict[str, str]]]
    implementation: Callable[[str], str]
    variants: Callable[[], list[tuple[str, dict[str, str]]]]
    macs: Callable[[Backbone], int]
    ceiling: Callable[[str, str], float]
    environment: Callable[[], dict[str, Any]]

    def build(self, spec: ModelSpec) -> Backbone:
        """The model of the specification, with fresh weights."""
        return self.create(
            spec.name,
            input_size=spec.input_size,
            in_channels=spec.in_channels,
            num_classes=spec.num_classes,
            **spec.options,
        )
