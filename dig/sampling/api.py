"""Load and sample from Python: the code path of ``python -m dig sample``, and its bits.

Shapes: N samples, C channels, h and w of the model's space, H and W pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dig.fields import check_word, real_number, whole_number
from dig.layers import Backbone
from dig.sampling.decoder import Decoder, open_decoder
from dig.sampling.images import make_grid, to_pixels
from dig.sampling.planning import doubts, plan_samples
from dig.sampling.runner import BatchSampler, default_precision
from dig.sampling.trained import Trained
from dig.sampling.weights import Published, load_weights, read_choice
from dig.training.needs import Footprint, check_sampling

logger = logging.getLogger(__name__)


TRAINED = "trained"
"""Where `load` leaves what a model was trained with."""


def load(
    source: str | PathLike[str],
    *,
    device: str | None = None,
    weights: str | None = None,
    model: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    backend: str | None = None,
) -> Backbone:
    """The model of a run, a checkpoint, an exported or published file, a folder of diffusers', or a hub name.

    Args:
        source: As ``python -m dig sample --checkpoint`` takes it.
        device: ``cuda`` or ``cpu``; None for a GPU where there is one.
        weights: Of a run: ``averaged`` (if not given) or ``raw``.
        model: Name with options, of a published file that doesn't say it: ``DiT-XL/2``.
        image_size: Of such a file, in pixels; 256 if not given.
        num_classes: Of such a file; 1000 if not given.
        backend: One of the family's; the device's default if not given.

    Returns:
        The model in eval mode. Its ``trained`` says what it was trained with and as (`dig.sampling.trained.Trained`):
        ``num_classes``, ``class_names``, ``image_size``, whether it is ``latent``, ``step``.

    Raises:
        CheckpointError: There are no weights, or they can't be used.
        HubError: A name on the hub can't be fetched.
        TypeError: An argument is of another type; the message names it.
    """
    if not isinstance(source, str | PathLike) or not str(source):
        raise TypeError(f"source must be a path or a name on the hub; got {source!r:.80}")
    for name, word in (("device", device), ("weights", weights), ("model", model), ("backend", backend)):
        if word is not None:
            check_word(name, word)
    image_size, num_classes = (
        value if value is None else whole_number(name, value)
        for name, value in (("image_size", image_size), ("num_classes", num_classes))
    )
    where = _device(device)
    if model is None and (image_size, num_classes) != (None, None):
        raise ValueError("image_size and num_classes describe a published file, together with model")
    published = None if model is None else Published(model=model, image_size=image_size, num_classes=num_classes)
    found = load_weights(Path(source), device=where, published=published, backend=backend, choice=read_choice(weights))
    network = found.build(where)
    setattr(network, TRAINED, found.trained())
    return network


def _device(device: str | None) -> str:
    present = torch.cuda.is_available()
    if device is None:
        return "cuda" if present else "cpu"
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu; got {device!r}")
    if device == "cuda" and not present:
        raise ValueError("no NVIDIA GPU was found; use device='cpu', or run on a machine with one")
    return device


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """What was sampled.

    Attributes:
        tensor: (N, C, h, w) fp32 on the CPU, as the model makes them: pixels in about [-1, 1], or scaled latents.
        labels: (N,) int64.
        classes: Name of each sample's class, its number where names are not known.
        pixels: (N, H, W, 3) uint8; None of latents without a VAE.
    """

    tensor: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    pixels: NDArray[np.uint8] | None

    def __len__(self) -> int:
        return len(self.tensor)

    def _drawn(self) -> NDArray[np.uint8]:
        if self.pixels is None:
            raise ValueError("these are latents: give sample(..., vae=...) to get images")
        return self.pixels

    @cached_property
    def images(self) -> list[Image.Image]:
        """A picture of each.

        Raises:
            ValueError: They are latents, and no VAE was given.
        """
        return [Image.fromarray(image) for image in self._drawn()]

    def grid(self, columns: int | None = None) -> Image.Image:
        """All of them in one picture, row by row; about square if not told otherwise."""
        if columns is not None and whole_number("columns", columns) < 1:
            raise ValueError(f"columns must be at least 1; got {columns}")
        return Image.fromarray(make_grid(self._drawn(), columns))


@torch.no_grad()
def sample(
    model: Backbone,
    classes: str | Sequence[int | str | None] | None = None,
    *,
    samples: int | None = None,
    steps: int | None = None,
    cfg: float = 1.0,
    seed: int = 0,
    sampler: str | None = None,
    eta: float = 0.0,
    cfg_channels: str = "three",
    first: int = 0,
    model_batch: int | None = None,
    vae: str | PathLike[str] | None = None,
    other_vae: bool = False,
    dtype: str | None = None,
    execution: str | None = None,
) -> Samples:
    """Sample from a model; the same seed gives what ``python -m dig sample`` gives, bit for bit.

    Args:
        model: Of `load`, or any backbone.
        classes: Labels, taken in turn: indices, names, None for no class, or the command's text. All if not given.
        samples: How many; 8 a class, 100 at most, if not given.
        steps: Sampling steps; the sampler's own default if not given.
        cfg: Classifier-free guidance; 1 is none.
        seed: Of the noise.
        sampler: ``ddim``, ``ddpm``, ``dpm-solver++``, or ``euler`` for flow matching.
        eta: Share of noise of ``ddim``.
        cfg_channels: Which noise channels are guided: ``three`` (as published) or ``all``.
        first: Index of the first sample: each is a function of the seed and its index.
        model_batch: Images that the model takes at once, part of what decides on their last bits.
        vae: Decodes latents: a folder or a hub name. The one that came with the model if not given.
        other_vae: Whether it may be another one than the latents were made with.
        dtype: ``bf16``, of a model that was cast (``model.to(torch.bfloat16)``), ``autocast`` to that, or ``fp32``. If
            not given, bf16 for what was cast, else autocast on a GPU.
        execution: ``graph`` (the whole loop as a CUDA graph) or ``eager``; graph on a GPU if not given.

    Raises:
        ValueError: This model can't be sampled so; the message says what to change.
        NotFiniteError: The samples are not finite.
        TypeError: An argument is of another type; the message names it.
    """
    if not isinstance(getattr(model, "_orig_mod", model), Backbone):  # torch.compile's wrapper hands on what it wraps
        raise TypeError(
            f"model must be a dig.layers.Backbone, as dig.load and bench.models.create_model give; got "
            f"{type(model).__name__}" + (": dig.load takes a path or name" if isinstance(model, str | PathLike) else "")
        )
    seed, first = whole_number("seed", seed), whole_number("first", first)
    samples, steps, model_batch = (
        value if value is None else whole_number(name, value)
        for name, value in (("samples", samples), ("steps", steps), ("model_batch", model_batch))
    )
    cfg, eta = real_number("cfg", cfg), real_number("eta", eta)
    check_word("cfg_channels", cfg_channels)
    for name, word in (("sampler", sampler), ("dtype", dtype), ("execution", execution)):
        if word is not None:
            check_word(name, word)
    if vae is not None and not isinstance(vae, str | PathLike):
        raise TypeError(f"vae must be a folder or a name on the hub; got {vae!r:.80}")
    if not isinstance(other_vae, bool):
        raise TypeError(f"other_vae must be True or False; got {other_vae!r:.80}")
    first_weight = next(model.parameters())
    where = first_weight.device
    if execution not in (None, "graph", "eager"):
        raise ValueError(f"execution must be graph or eager; got {execution!r}")
    if execution == "graph" and where.type != "cuda":
        raise ValueError("execution graph is a CUDA graph and needs an NVIDIA GPU; use eager")
    trained: Trained | None = getattr(model, TRAINED, None)
    names = trained.class_names if trained is not None else ()
    plan = plan_samples(
        classes=classes,
        class_names=names,
        num_classes=model.num_classes,
        loss=trained.loss if trained is not None else "hybrid",
        tokens=math.prod(model.grid),
        device=where.type,
        samples=samples,
        sampler=sampler,
        cfg=cfg,
        cfg_channels=cfg_channels,
        model_batch=model_batch,
        first=first,
        steps=steps,
        eta=eta,
        seed=seed,
        precision=default_precision(where.type, cast=first_weight.dtype == torch.bfloat16) if dtype is None else dtype,
    )
    decoder = None
    if trained is not None:
        for warning in doubts(trained, plan):
            logger.warning("%s", warning)
        at_once = plan.model_batch * (2 if plan.cfg_scale != 1 else 1)
        check_sampling(Footprint.of(trained.spec), device=where.type, at_once=at_once)
        decoder = _decoder(trained, vae, other=other_vae, device=where.type)
    elif vae is not None:
        raise ValueError("vae is of a model from dig.load, which knows the scale of its latents")
    captures = (execution or ("graph" if where.type == "cuda" else "eager")) == "graph"
    training = model.training
    model.eval()
    try:
        runner = BatchSampler(model, plan, where, graph=captures, finish=lambda x: x.float().cpu().numpy())
        tensor = torch.from_numpy(runner.samples(range(plan.first, plan.first + plan.count)).copy())
    finally:
        model.train(training)
    labels = plan.labels(range(plan.first, plan.first + plan.count))
    known = {label: names[label] if names else str(label) for label in set(labels) if label < model.num_classes}
    return Samples(
        tensor=tensor,
        labels=torch.tensor(labels),
        classes=tuple(known.get(label, "no class") for label in labels),
        pixels=_pixels(tensor, decoder, where, latent=trained.latent if trained is not None else False),
    )


def _decoder(trained: Trained, vae: str | PathLike[str] | None, *, other: bool, device: str) -> Decoder | None:
    return open_decoder(
        trained.vae if vae is None else str(vae),
        trained.latent_scale,
        device,
        channels=trained.spec.in_channels,
        made_by=trained.vae_sha256,
        other=other,
    )


def _pixels(tensor: Tensor, decoder: Decoder | None, device: torch.device, *, latent: bool) -> Any:
    """(N, H, W, 3) uint8 of what the model made; None where only a VAE could say."""
    if decoder is not None:
        return np.concatenate([to_pixels(decoder.decode(part.to(device))) for part in tensor.split(1)])
    return to_pixels(tensor) if not latent and tensor.shape[1] in (1, 3) else None
