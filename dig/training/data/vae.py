"""The VAE between pixels and latents: diffusers' AutoencoderKL.

Shapes: n images; C, h, w channels, rows and columns of a latent; H, W of an image.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dig.hub import fetch, in_cache, is_hub_name
from dig.packages import quietly, require
from dig.training.data.base import DataError, pixels_to_unit

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FILES = [f"{folder}{file}" for folder in ("", "vae/") for file in (CONFIG, WEIGHTS)]
"""Of a VAE on the hub."""


def load_vae(name: str, device: torch.device) -> Any:
    """diffusers' AutoencoderKL, in fp32, frozen.

    Args:
        name: A folder with the VAE's ``config.json``, one with a whole pipeline (its ``vae`` is taken), or a hub name.
        device: Where it will run.

    Raises:
        MissingPackageError: diffusers is not installed.
        DataError: There is no such VAE.
        HubError: Its name on the hub can't be fetched.
    """
    diffusers = require("diffusers", "encode")
    folder = _folder_of(name)
    # Only safetensors: the other format is a pickle, which can run anything.
    options: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "torch_dtype": torch.float32}
    if (folder / "vae" / CONFIG).is_file():
        options["subfolder"] = "vae"
    try:
        with quietly():  # It imports more as it is asked for.
            vae, loaded = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True, **options)
    except MemoryError:
        raise DataError(f"cannot load the VAE {name!r}: not enough memory") from None
    # A folder of junk brings up nearly anything: OSError, KeyError, TypeError, SafetensorError, RecursionError.
    except Exception as error:
        raise DataError(f"cannot load the VAE {name!r}: {' '.join(str(error).split())[:300]}") from None
    # diffusers draws what is missing at random, and only warns.
    if missing := [*loaded.get("missing_keys", ()), *(str(key) for key in loaded.get("mismatched_keys", ()))]:
        raise DataError(
            f"the weights of the VAE {name!r} are not whole: {', '.join(missing[:3])} missing; fetch it again"
        )
    if not all(bool(weight.isfinite().all()) for weight in vae.state_dict().values()):
        raise DataError(f"the VAE {name!r} has weights that are not finite; fetch it again")
    if getattr(vae.config, "shift_factor", None):
        raise DataError(
            f"the VAE {name!r} shifts its latents, which is not supported; Stable Diffusion's 1 and 2 do not"
        )
    return vae.to(device).eval().requires_grad_(False)


def is_here(name: str) -> bool:
    """Whether `load_vae` needs nothing of the hub for a name that could be fetched; a missing folder it refuses."""
    if not is_hub_name(name):
        return True
    return in_cache(name, patterns=FILES, needed=[file for file in FILES if file.endswith(WEIGHTS)]) is not None


def _folder_of(name: str) -> Path:
    """Where a VAE lies, fetched from the hub if need be."""
    if not is_hub_name(name):
        if not Path(name).is_dir():
            raise DataError(
                f"cannot load the VAE {name!r}: there is no such folder; on the hub names have an owner, as "
                "stabilityai/sd-vae-ft-ema"
            )
        return Path(name)
    return fetch(name, patterns=FILES, needed=[file for file in FILES if file.endswith(WEIGHTS)], what="the VAE")


def weights_sha256(vae: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def downsampling(vae: Any) -> int:
    """How many pixels a side of a latent's pixel stands for."""
    factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
    return factor


def sample_latents(vae: Any, pixels: Tensor, noise: Tensor, scale: float) -> Tensor:
    """(n, 3, H, W) uint8 to (n, C, h, w) on the CPU: the posterior's mean plus its deviation times noise, scaled."""
    device = next(vae.parameters()).device
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        posterior = vae.encode(pixels_to_unit(pixels.to(device))).latent_dist
        return ((posterior.mean + posterior.std * noise.to(device)) * scale).cpu()
