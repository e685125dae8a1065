"""Weights to sample from: a run's newest checkpoint, one checkpoint file, or a published one.

Shapes: D width, C input channels, P patch side, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from dig.diffusion import LossName
from dig.family import BACKEND, FamilyError, UnknownModelError
from dig.fields import INTEGERS
from dig.layers import Backbone
from dig.messages import describe
from dig.registry import ModelSpec, list_variants, parse_model
from dig.sampling.published import file_kind, read_published
from dig.training.average import share_of_first_weights
from dig.training.config import TrainConfig
from dig.training.data.files import sha256_of
from dig.training.data.latents import LATENT_SCALE
from dig.training.lora import merged_state
from dig.training.resuming import check_same_run, no_family, recorded_config
from dig.training.saving import (
    FOLDER,
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
MAX_SIDE = 2**16
"""Pixels along a side of a published model's images, and no more classes than its square: beyond are typing errors."""

WeightsChoice = Literal["averaged", "raw"]
"""Of a run's checkpoint: the moving average of its weights, or the weights of its last step."""
_PREFIXES: dict[str, str] = {"averaged": "ema.", "raw": "model."}
FEW_DROPPED = 100
"""Images shown without their label, fewer than which leave the null label's embedding about as it began."""
MOSTLY_FIRST = 0.1
"""An average of more than this share of the first weights is worth a warning."""


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
        state: Its state dict, on the CPU.
        choice: Which of a run's weights they are; None of a published file's.
        class_names: Name of each label, where it is known.
        latent_scale: What latents were multiplied with; None for a model of pixels.
        loss: What the model was trained with, which decides on the samplers.
        step: Steps it was trained for, where that is known.
        seconds: Time it was trained for, likewise.
        vae_sha256: Of the weights of the VAE that its latents were made with, likewise.
        unlabelled: About how many images it was shown without their label, likewise.
        share_of_first: How much of averaged weights is still the first ones, 0 to 1.
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
    choice: WeightsChoice | None = None
    vae_sha256: str | None = None
    unlabelled: float | None = None
    share_of_first: float = 0.0

    def check_guidance(self, *, guided: bool, null: bool) -> str | None:
        """Whether samples that take the null label can mean anything: a warning, or None.

        Args:
            guided: Whether there is guidance.
            null: Whether samples of no class are asked for.

        Raises:
            ValueError: It was never trained: what it adds is noise that looks like a result.
        """
        if not (guided or null) or self.unlabelled is None or self.unlabelled >= FEW_DROPPED:
            return None
        what = "guidance" if guided else "samples of no class"
        if self.unlabelled == 0:
            remedy = "use --cfg 1" if guided else "name classes"
            raise ValueError(
                f"{what} would mean nothing: {self.path} was trained with --label-dropout 0, never without a label; "
                f"{remedy}, or train with label dropout"
            )
        return f"{what} may mean little: {self.path} has seen about {self.unlabelled:.0f} images without their label"

    def check_average(self) -> str | None:
        """A warning where averaged weights are still mostly the first ones, which draw noise; or None."""
        if self.choice != "averaged" or self.share_of_first <= MOSTLY_FIRST:
            return None
        return (
            f"the averaged weights of {self.path} are still {100 * self.share_of_first:.0f}% the first ones, which "
            "draw noise: --weights raw samples from the last ones"
        )

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
    choice: WeightsChoice | None = None,
) -> Weights:
    """Find and read weights.

    Args:
        path: A run's folder (its newest whole checkpoint is taken), or a file of a run or a published one.
        device: ``cuda`` or ``cpu``; decides which backend runs, unless that is chosen.
        published: For a published file only.
        backend: One of the family's.
        choice: Which weights of a run's checkpoint; the averaged ones if not given.

    Raises:
        CheckpointError: There are no weights, or they can't be used.
    """
    if choice is not None and choice not in get_args(WeightsChoice):
        raise ValueError(f"weights must be {' or '.join(get_args(WeightsChoice))}; got {choice!r}")
    if path.is_dir():
        run = path
        newest = newest_checkpoint(path / FOLDER) or newest_checkpoint(path)
        if newest is None:
            raise CheckpointError(f"{path} holds no checkpoint; python -m dig train --out {path} writes them")
        path = newest
        _check_run(run, path)
    elif not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    elif path in checkpoint_files(path.parent) and (wrong := damage(path)):
        raise CheckpointError(f"{wrong}; name another checkpoint, or the run's folder for the newest whole one")
    kind = file_kind(path)
    if kind == "safetensors" and read_about(path) is not None:
        if published is not None:
            raise CheckpointError(f"{path} says itself which model it is; leave out the model's name, size and classes")
        return _own(path, device, backend, choice or "averaged")
    if choice is not None:
        raise CheckpointError(f"{path} is no checkpoint of a run: it has one set of weights; leave out --weights")
    if published is None:
        raise CheckpointError(f"{path} does not say which model it is; name it, as in --model DiG-XL/2")
    return _published(path, published, device, backend)


def _check_run(folder: Path, checkpoint: Path) -> None:
    """Raise `CheckpointError` where a run's folder says that it is of another run than its checkpoint."""
    config = recorded_config(folder)
    about = read_about(checkpoint)
    if config is not None and about is not None:
        check_same_run(config, checkpoint, about)


def _own(path: Path, device: str, backend: str | None, choice: WeightsChoice) -> Weights:
    checkpoint = read_checkpoint(path, _PREFIXES[choice])
    about = checkpoint.about
    try:
        config = TrainConfig.from_json(about["config"])
        step, seconds = about["step"], about["seconds"]
        numbers = isinstance(step, int) and isinstance(seconds, int | float)
        if not numbers or not all(0 <= number < INTEGERS for number in (step, seconds)):
            raise ValueError(f"step {str(step)[:60]}, seconds {str(seconds)[:60]}")
    except (FamilyError, UnknownModelError) as error:
        raise no_family(path, error) from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no run that this version knows: {error}") from None
    state, spec = checkpoint.tensors, _on_device(config.model, device, backend)
    if config.lora:
        try:
            state = merged_state(spec.build(), config, state)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not hold adapters as it says: {describe(error)[:200]}") from None
    return Weights(
        path=checkpoint.path,
        sha256=sha256_of(checkpoint.path),
        spec=spec,
        state=state,
        class_names=config.data.class_names,
        latent_scale=config.data.latent_scale,
        loss=config.loss,
        step=step,
        seconds=seconds,
        choice=choice,
        vae_sha256=config.data.vae_sha256,
        unlabelled=config.label_dropout * config.batch * step,
        share_of_first=share_of_first_weights(step, config.ema, warmup=config.ema_warmup),
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
    if not VAE_FACTOR <= published.image_size <= MAX_SIDE or not 1 <= published.num_classes <= MAX_SIDE**2:
        raise CheckpointError(
            f"--image-size must be {VAE_FACTOR} to {MAX_SIDE:,}, --num-classes 1 to {MAX_SIDE**2:,}; got "
            f"{published.image_size} and {published.num_classes}"
        )
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
        names = _models_of(shapes, patch, channels, classes)
        hint = f"; the weights are those of {' or '.join(names)}" if names else "; no known model has such weights"
        if names and found.classes != wanted.classes:
            hint += f" with {found.classes} classes"
    raise CheckpointError(f"{path} does not hold {spec.describe()}: it has {', '.join(says)}{hint}")


def _models_of(shapes: Mapping[str, torch.Size], patch: int, channels: int, classes: int) -> list[str]:
    """Names of the models that have these parameters; the positions, which image size decides on, are left out."""
    names: list[str] = []
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
