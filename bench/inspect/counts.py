"""What a model needs for one image: parameters, and multiply-adds in full and as the DiG paper counts.

torch is imported late.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dig.spec import VAE_FACTOR, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of a model for latents of 256-pixel images and 1000 classes.

    Attributes:
        parameters: Trainable ones.
        macs: Multiply-adds of a forward pass in full (`dig.flops.model_macs`).
        paper_macs: As the paper counts DiG (`bench.measure.flops.paper_macs`); None of others.
    """

    parameters: int
    macs: int
    paper_macs: int | None


def count(name: str, options: Mapping[str, str] | None = None, *, pixels: int = 256) -> Counts:
    """Build a model without memory, and count.

    Args:
        name: ``DiG-S/4``.
        options: The family's.
        pixels: Side of the image.

    Raises:
        UnknownModelError: No such model or option.
        UncountedError: Its FLOPs cannot be counted.
        MissingPackageError: It needs a package that is not installed.
    """
    from bench.measure.flops import paper_macs
    from dig.flops import model_macs
    from dig.meta import on_meta
    from dig.model import DiG

    side = pixels // VAE_FACTOR
    spec = ModelSpec(name=name, options=options or {}, input_size=(side, side), in_channels=4, num_classes=1000)
    with on_meta():
        model = spec.build()
    macs = model_macs(spec, model)
    return Counts(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=macs,
        paper_macs=paper_macs(model, macs) if isinstance(model, DiG) else None,
    )
