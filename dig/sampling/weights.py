"""Weights to sample from: a run's newest checkpoint, one checkpoint file, or a published one.

Shapes: D width, C input channels, P patch side, T tokens.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dig.checkpoints import from_release
from dig.diffusion import LossName
from dig.family import BACKEND
from dig.layers import Backbone
from dig.registry import ModelSpec, list_variants, parse_model
from dig.training.config import TrainConfig
from dig.training.data.files import sha256_of
from dig.training.data.latents import LATENT_SCALE
from dig.training.saving import (
    FOLDER,
    Checkpoint,
    CheckpointError,
    checkpoint_files,
    damage,
    newest_checkpoint,
    read_about,
    read_checkpoint,
)

VAE_FACTOR = 8
"""Pixels to a cell of the latents that the published models were trained on, along each side."""
LATENT_CHANNELS = 4


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a published file doesn't say of itself.

    Attributes:
        model: Name with options, as `dig.registry.parse_model` reads it.
        image_size: Side of the images in pixels.
        num_classes: Labels.
    """

    model: str
    image_size: int = 256
    num_classes: int = 1000


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's weights and what it takes to sample with them.

    Attributes:
        path: The file.
        sha256: Of the file.
        spec: The model, its backend chosen for the device.
        state: Its state dict, on the CPU; of a run's checkpoint, the averaged weights.
        class_names: Name of each label, where it is known.
        latent_scale: What latents were multiplied with; None for a model of pixels.
        loss: What the model was trained with, which decides on the samplers.
        step: Steps it was trained for, where that is known.
        seconds: Time it was trained for, likewise.
    """

    path: Path
    sha256: str
    spec: ModelSpec
    state: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    latent_scale: float | None
    loss: LossName = "hybrid"
    step: int | None = None
    seconds: float | None = None

    def build(self, device: torch.device | str) -> Backbone:
        """The model with these weights, in eval mode.

        Raises:
            CheckpointError: The weights are not this model's; the message says what they are.
        """
        model = self.spec.build()
        check_fit(self.state, model, self.spec, self.path)
        model.load_state_dict(self.state)
        return model.to(device).eval()


def load_weights(
    path: Path,
    *,
    device: str,
    published: Published | None = None,
    backend: str | None = None,
) -> Weights:
    """Find and read weights.

    Args:
        path: A run's folder (its newest whole checkpoint is taken), or a file of a run or a published one.
        device: ``cuda`` or ``cpu``; decides which backend runs, unless that is chosen.
        published: For a published file only.
        backend: One of the family's.

    Raises:
        CheckpointError: There are no weights, or they can't be used.
    """
    if path.is_dir():
        newest = newest_checkpoint(path / FOLDER) or newest_checkpoint(path)
        if newest is None:
            raise CheckpointError(f"{path} holds no checkpoint; python -m dig train --out {path} writes them")
        path = newest
    elif not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    elif path in checkpoint_files(path.parent) and (wrong := damage(path)):
        raise CheckpointError(f"{wrong}; name another checkpoint, or the run's folder for the newest whole one")
    if path.suffix == ".safetensors" and read_about(path) is not None:
        if published is not None:
            raise CheckpointError(f"{path} says itself which model it is; leave out the model's name, size and classes")
        return _own(read_checkpoint(path, "ema."), device, backend)
    if published is None:
        raise CheckpointError(f"{path} does not say which model it is; name it, as in --model DiG-XL/2")
    return _published(path, published, device, backend)


def _own(checkpoint: Checkpoint, device: str, backend: str | None) -> Weights:
    about = checkpoint.about
    try:
        config = TrainConfig.from_json(about["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path} describes no run that this version knows: {error}") from None
    return Weights(
        path=checkpoint.path,
        sha256=sha256_of(checkpoint.path),
        spec=_on_device(config.model, device, backend),
        state=checkpoint.tensors,
        class_names=config.data.class_names,
        latent_scale=config.data.latent_scale,
        loss=config.loss,
        step=about.get("step"),
        seconds=about.get("seconds"),
    )


def _on_device(spec: ModelSpec, device: str, backend: str | None) -> ModelSpec:
    """The same weights on the backend for this device: it need not be the one of training."""
    words = [f"{name}={value}" for name, value in spec.options.items() if name != BACKEND]
    if backend is not None:
        words.append(f"{BACKEND}={backend}")
    name, options, _ = parse_model(":".join([spec.name, *words]), device)
    return replace(spec, name=name, options=options)


def _published(path: Path, published: Published, device: str, backend: str | None) -> Weights:
    name, options, source = parse_model(published.model, device)
    if published.image_size % VAE_FACTOR:
        raise CheckpointError(f"image size {published.image_size} is not a multiple of {VAE_FACTOR}")
    side = published.image_size // VAE_FACTOR
    spec = ModelSpec(
        name=name,
        options=options,
        input_size=(side, side),
        in_channels=LATENT_CHANNELS,
        num_classes=published.num_classes,
        source=source,
    )
    if backend is not None:
        spec = _on_device(spec, device, backend)
    return Weights(
        path=path,
        sha256=sha256_of(path),
        spec=spec,
        state=read_published(path),
        latent_scale=LATENT_SCALE,
    )


def read_published(path: Path) -> dict[str, Tensor]:
    """The state dict of a published file, under this project's names; the averaged weights where it has both.

    Raises:
        CheckpointError: It is damaged, is no state dict, or would have to run code to be read.
    """
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        found = re.search(r"Unsupported (?:global|class|operand)[^.]*|GLOBAL \S+", reason)
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors ({found.group(0) if found else reason[:200]}), and reading "
            "that could run any code. Save its weights alone, as a state dict, where you trust it"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    for part in ("ema", "state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(part), Mapping):
            content = content[part]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict: tensors by name, or those under ema, model or state_dict")
    state = {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in content.items()}
    if any(".attn.q_proj." in name for name in state):
        try:
            state = from_release(state)
        except KeyError as error:
            raise CheckpointError(f"{path}: {error.args[0]}") from None
    return state


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
    if found.width is not None and found.classes is not None and found.input_channels is not None:
        names = _models_of(shapes, found.patch_size, found.input_channels, found.classes)
        hint = f"; the weights are those of {' or '.join(names)}" if names else "; no known model has such weights"
        if names and found.classes != wanted.classes:
            hint += f" with {found.classes} classes"
    raise CheckpointError(f"{path} does not hold {spec.describe()}: it has {', '.join(says)}{hint}")


def _models_of(shapes: Mapping[str, torch.Size], patch: int | None, channels: int, classes: int) -> list[str]:
    """Names of the models that have these parameters; the positions, which image size decides on, are left out."""
    names: list[str] = []
    if patch is None:
        return names
    ours = {name: shape for name, shape in shapes.items() if name != "pos_embed"}
    for name, options in list_variants():
        if not name.endswith(f"/{patch}"):
            continue
        with torch.device("meta"):
            model = ModelSpec(
                name=name,
                options=options,
                input_size=(patch, patch),
                in_channels=channels,
                num_classes=classes,
            ).build()
        theirs = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "pos_embed"}
        if ours == theirs:
            names.append(":".join([name, *(f"{option}={value}" for option, value in options.items())]))
    return names
