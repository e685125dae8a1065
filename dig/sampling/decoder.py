"""A VAE that makes images of latents, for whoever samples.

Shapes: B latents, C, h, w their channels, rows and columns; H, W of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dig.diffusion import NotFiniteError
from dig.training.data.vae import load_vae, weights_sha256


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A VAE that makes images of latents.

    Attributes:
        decode: Scaled latents (B, C, h, w) to images (B, 3, H, W).
        sha256: Of the VAE's weights.
        model: The VAE itself, diffusers' AutoencoderKL.
    """

    decode: Callable[[Tensor], Tensor]
    sha256: str
    model: Any


def open_decoder(
    vae: str | None,
    scale: float | None,
    device: str,
    *,
    channels: int | None = None,
    made_by: str | None = None,
    other: bool = False,
) -> Decoder | None:
    """The VAE of that name; None without one.

    Args:
        vae: A folder or a name on the hub.
        scale: What latents were multiplied with; None in pixel space.
        device: Where it runs.
        channels: C of the latents.
        made_by: SHA-256 of the weights of the VAE that the latents were made with, where that is known.
        other: Whether it may be another one.

    Raises:
        ValueError: There is no such VAE, it doesn't fit the latents, or a model of pixels needs none.
    """
    if vae is None:
        return None
    if scale is None:
        raise ValueError("this model works on pixels: it needs no --vae")
    model: Any = load_vae(vae, torch.device(device))
    if channels is not None and model.config.latent_channels != channels:
        raise ValueError(f"the VAE {vae} decodes {model.config.latent_channels} channels; the latents have {channels}")
    sha256 = weights_sha256(model)
    if made_by is not None and made_by != sha256 and not other:
        raise ValueError(
            f"the VAE {vae} is not the one that the latents were made with (weights {sha256[:12]}, not "
            f"{made_by[:12]}): name that one; a decoder that was tuned for the same latents takes sample --other-vae"
        )

    def decode(x: Tensor) -> Tensor:
        with torch.inference_mode():
            # One image at a time: a decoder's activations are hundreds of times its input.
            images = torch.cat([model.decode(part / scale).sample for part in x.split(1)])
        if not bool(torch.isfinite(images).all()):
            raise NotFiniteError(f"what the VAE {vae} makes of the latents is not finite, and is not drawn")
        return images

    return Decoder(decode=decode, sha256=sha256, model=model)
