"""What a state dict's shapes say of its model, and whether it is the one that was asked for.

Shapes: D width, C input channels, P patch side, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dig.layers import Backbone
from dig.meta import on_meta
from dig.registry import list_variants
from dig.spec import ModelSpec
from dig.training.saving import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What the shapes of a state dict say of its model; None where they don't."""

    width: int | None
    depth: int
    patch_size: int | None
    input_channels: int | None
    classes: int | None
    tokens: int | None

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Anatomy:
        """Read the shapes."""

        def shape(*names: str) -> tuple[int, ...]:
            found = (tuple(state[name].shape) for name in names if name in state)
            return next(found, ())

        patches = shape("x_embedder.proj.weight", "patch_embed.proj.weight")
        whole = len(patches) == 4
        labels = shape("y_embedder.embedding_table.weight", "label_emb.embedding_table.weight")
        positions = shape("pos_embed")
        blocks = {match.group(0) for name in state if (match := re.match(r"\w*blocks\.\d+\.|\w*block\.", name))}
        return cls(
            width=patches[0] if whole else None,
            depth=len(blocks),
            patch_size=patches[2] if whole else None,
            input_channels=patches[1] if whole else None,
            classes=labels[0] - 1 if labels else None,
            tokens=positions[1] if len(positions) == 3 else None,
        )

    def differences(self, other: Anatomy) -> list[str]:
        """``width 384 (model: 768)`` of everything that differs."""
        words = {
            "width": "width",
            "depth": "depth in blocks",
            "patch_size": "patch size",
            "input_channels": "input channels",
            "classes": "classes",
            "tokens": "tokens (image size)",
        }
        pairs = [(text, getattr(self, name), getattr(other, name)) for name, text in words.items()]
        return [f"{text} {ours} (model: {theirs})" for text, ours, theirs in pairs if ours != theirs]


def check_fit(state: Mapping[str, Tensor], model: Backbone, spec: ModelSpec, path: Path) -> None:
    """Raise `CheckpointError` unless the state dict is this model's, saying in words what it is instead."""
    expected = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if shapes == {name: tensor.shape for name, tensor in expected.items()}:
        return
    found, wanted = Anatomy.of(state), Anatomy.of(expected)
    says = found.differences(wanted)
    if not says:
        missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
        other = [name for name in expected.keys() & shapes.keys() if expected[name].shape != shapes[name]]
        says += [f"no {missing[0]} ({len(missing)} parameters are missing)"] if missing else []
        says += [f"{extra[0]}, which the model has not ({len(extra)} such)"] if extra else []
        says += [f"{other[0]} as {tuple(shapes[other[0]])}, not {tuple(expected[other[0]].shape)}"] if other else []
    hint = ""
    patch, channels, classes = found.patch_size, found.input_channels, found.classes
    if found.width and patch and channels and classes and classes > 0:
        names = models_of(shapes, patch, channels, classes)
        hint = f"; the weights are those of {' or '.join(names)}" if names else "; no known model has such weights"
        if names and found.classes != wanted.classes:
            hint += f" with {found.classes} classes"
    raise CheckpointError(f"{path} does not hold {spec.describe()}: it has {', '.join(says)}{hint}")


def models_of(
    shapes: Mapping[str, torch.Size], patch: int, channels: int, classes: int, *, family: str | None = None
) -> list[str]:
    """Names of the models that have these parameters; the positions, which image size decides on, are left out.

    Args:
        shapes: Of a state dict, by name.
        patch: P.
        channels: C.
        classes: Labels.
        family: The only one to look at; None for all.
    """
    names: list[str] = []
    ours = {name: shape for name, shape in shapes.items() if name != "pos_embed"}
    for name, options in list_variants():
        if not name.endswith(f"/{patch}") or (family is not None and not name.startswith(f"{family}-")):
            continue
        size: dict[str, Any] = {"input_size": (patch, patch), "in_channels": channels, "num_classes": classes}
        try:
            with on_meta():
                model = ModelSpec(name=name, options=options, **size).build()
        except Exception:  # Anybody's family may raise anything; it then isn't one that these weights are named by.
            continue
        theirs = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "pos_embed"}
        if ours == theirs:
            names.append(":".join([name, *(f"{option}={value}" for option, value in options.items())]))
    return names
