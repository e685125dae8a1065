"""Weights to sample from: a run's newest checkpoint, one checkpoint file, an exported one, or a published one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from dig.family import BACKEND, FamilyError, UnknownModelError
from dig.fields import INTEGERS
from dig.hub import fetch, is_hub_name
from dig.layers import Backbone
from dig.messages import describe
from dig.registry import parse_model, parse_name
from dig.sampling.anatomy import Anatomy, check_fit
from dig.sampling.folders import HUB_FILES, HUB_NEEDED, read_folder, read_header, weights_in
from dig.sampling.published import PublishedFile, file_kind, read_published
from dig.sampling.trained import Trained, WeightsChoice
from dig.spec import VAE_FACTOR, ModelSpec
from dig.training.average import share_of_first_weights
from dig.training.config import TrainConfig
from dig.training.data.files import sha256_of
from dig.training.data.shards import LATENT_SCALE
from dig.training.lora import merged_state
from dig.training.resuming import check_same_run, no_family, recorded_config
from dig.training.saving import (
    FOLDER,
    CheckpointError,
    checkpoint_files,
    checkpoint_sha256,
    damage,
    newest_checkpoint,
    read_about,
    read_checkpoint,
)

LATENT_CHANNELS = 4
PIXEL_CHANNELS = (1, 3)
MAX_SIDE = 2**16
"""Pixels along a side of a published model's images, and no more classes than its square: beyond are typing errors."""

_PREFIXES: dict[str, str] = {"averaged": "ema.", "raw": "model."}


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a published file doesn't say of itself.

    Attributes:
        model: Name with options, as `dig.registry.parse_model` reads it.
        image_size: Side of the images in pixels; None for what the file says of itself, else 256.
        num_classes: Labels; None likewise, else 1000.
    """

    model: str
    image_size: int | None = None
    num_classes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Weights(Trained):
    """A model's weights and what it takes to sample with them.

    Attributes:
        state: Its state dict, on the CPU.
    """

    state: dict[str, Tensor]

    def trained(self) -> Trained:
        """What is known of the weights, without them."""
        return Trained(**{entry.name: getattr(self, entry.name) for entry in fields(Trained)})

    def build(self, device: torch.device | str) -> Backbone:
        """The model with these weights, in eval mode.

        Raises:
            CheckpointError: The weights are not this model's; the message says what they are.
        """
        model = self.spec.build()
        check_fit(self.state, model, self.spec, self.path)
        model.load_state_dict(self.state)
        return model.to(device).eval()


def read_choice(word: str | None) -> WeightsChoice | None:
    """Which weights of a run a word means; ``average`` and ``ema`` are read too.

    Raises:
        ValueError: None of them.
    """
    known = {**{choice: choice for choice in get_args(WeightsChoice)}, "average": "averaged", "ema": "averaged"}
    if word is not None and word not in known:
        raise ValueError(f"weights must be {' or '.join(get_args(WeightsChoice))}; got {word!r}")
    return None if word is None else cast(WeightsChoice, known[word])


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
        path: A run's folder (its newest whole checkpoint is taken); a file of a run, of ``python -m dig export`` or a
            published one; a folder that diffusers or ``python -m dig export`` wrote; or a name on the hub.
        device: ``cuda`` or ``cpu``; decides which backend runs, unless that is chosen.
        published: For a published file only.
        backend: One of the family's.
        choice: Which weights of a run's checkpoint; the averaged ones if not given.

    Raises:
        CheckpointError: There are no weights, or they can't be used.
        HubError: A name on the hub can't be fetched.
    """
    choice = read_choice(choice)
    if is_hub_name(str(path)):
        path = fetch(str(path), patterns=HUB_FILES, needed=HUB_NEEDED, what="the checkpoint")
    shards = path.is_dir() and path in checkpoint_files(path.parent)
    if path.is_dir() and not shards:
        run = path
        newest = newest_checkpoint(path / FOLDER) or newest_checkpoint(path)
        if newest is None:
            if weights_in(path) is not None:
                _refuse_extras(path, published, choice)
                return _described(*read_folder(path), device, backend)
            raise CheckpointError(f"{path} holds no checkpoint; python -m dig train --out {path} writes them")
        path = newest
        _check_run(run, path)
    elif not (path.is_file() or shards):
        raise CheckpointError(f"{path} does not exist")
    elif path in checkpoint_files(path.parent) and (wrong := damage(path)):
        raise CheckpointError(f"{wrong}; name another checkpoint, or the run's folder for the newest whole one")
    if path.is_dir() or file_kind(path) == "safetensors":
        if read_about(path) is not None:
            _refuse_extras(path, published, None)
            return _own(path, device, backend, choice or "averaged")
        if (said := read_header(path)) is not None:
            _refuse_extras(path, published, choice)
            return _described(path, read_published(path).state, said, device, backend)
    _refuse_extras(path, None, choice)
    return _published(path, published, device, backend)


def _refuse_extras(path: Path, published: Published | None, choice: WeightsChoice | None) -> None:
    """Raise `CheckpointError` where more is said of weights than they need."""
    if published is not None:
        raise CheckpointError(f"{path} says itself which model it is; leave out the model's name, size and classes")
    if choice is not None:
        raise CheckpointError(f"{path} is no checkpoint of a run: it has one set of weights; leave out --weights")


def _described(path: Path, state: dict[str, Tensor], said: dict[str, Any], device: str, backend: str | None) -> Weights:
    """Weights that say themselves what they are."""
    said = {**said, "spec": _on_device(said["spec"], device, backend)}
    return Weights(path=path, sha256=sha256_of(path), state=state, **said)


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
        sha256=checkpoint_sha256(checkpoint.path),
        spec=spec,
        state=state,
        class_names=config.data.class_names,
        latent_scale=config.data.latent_scale,
        loss=config.loss,
        step=step,
        seconds=seconds,
        choice=choice,
        vae_sha256=config.data.vae_sha256,
        # A run that began with a file's weights counts its own steps alone, and its first weights draw no noise.
        unlabelled=None if config.init else config.label_dropout * config.batch * step,
        share_of_first=0.0 if config.init else share_of_first_weights(step, config.ema, warmup=config.ema_warmup),
    )


def _on_device(spec: ModelSpec, device: str, backend: str | None) -> ModelSpec:
    """The same weights on the backend for this device: it need not be the one of training."""
    words = [f"{name}={value}" for name, value in spec.options.items() if name != BACKEND]
    if backend is not None:
        words.append(f"{BACKEND}={backend}")
    name, options, _ = parse_model(":".join([spec.name, *words]), device)
    return replace(spec, name=name, options=options)


def _published(path: Path, published: Published | None, device: str, backend: str | None) -> Weights:
    file = read_published(path)
    asked = _asked(path, published, file)
    name, options, source = parse_model(asked.model, device)
    size = 256 if asked.image_size is None else asked.image_size
    classes = 1000 if asked.num_classes is None else asked.num_classes
    if not 1 <= size <= MAX_SIDE or not 1 <= classes <= MAX_SIDE**2:
        raise CheckpointError(
            f"--image-size must be 1 to {MAX_SIDE:,}, --num-classes 1 to {MAX_SIDE**2:,}; got {size} and {classes}"
        )
    # Published models are of latents; what was exported here may be of pixels, which its first layer's shape says.
    anatomy = Anatomy.of(file.state)
    latents = anatomy.input_channels not in PIXEL_CHANNELS
    channels = anatomy.input_channels if anatomy.input_channels in PIXEL_CHANNELS else LATENT_CHANNELS
    smallest = (VAE_FACTOR if latents else 1) * (anatomy.patch_size or 1)
    if size % smallest:
        raise CheckpointError(f"image size {size} is not a multiple of {smallest}")
    side = size // VAE_FACTOR if latents else size
    spec = ModelSpec(
        name=name,
        options=options,
        input_size=(side, side),
        in_channels=channels,
        num_classes=classes,
        source=source,
    )
    if backend is not None:
        spec = _on_device(spec, device, backend)
    scale = LATENT_SCALE if latents else None
    return Weights(path=path, sha256=sha256_of(path), spec=spec, state=file.state, latent_scale=scale)


def _asked(path: Path, published: Published | None, file: PublishedFile) -> Published:
    """The model of a published file: what is asked for, and where nothing is, what its training was called with."""
    said = file.arguments
    whole = {name: said.get(name) for name in ("image_size", "num_classes") if type(said.get(name)) is int}
    if published is not None:
        given = {name: getattr(published, name) for name in whole if getattr(published, name) is not None}
        return replace(published, **{**whole, **given})
    name = said.get("model")
    if not isinstance(name, str):
        raise CheckpointError(f"{path} does not say which model it is; name it, as in --model DiG-XL/2")
    # The authors' names are those of their own variant.
    words = ":variant=release" if file.renamed else ""
    try:
        parse_name(name)
    except UnknownModelError as error:
        raise CheckpointError(f"{path} was trained as {name[:60]!r} ({error}); name its model with --model") from None
    return Published(model=name + words, **whole)
