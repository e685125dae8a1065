"""Folders of weights: diffusers' DiT, alone or in a pipeline, and what ``python -m dig export`` writes for DiG and DiS.

Shapes: D width, C input channels, P patch side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dig.registry import families
from dig.sampling.anatomy import models_of
from dig.sampling.diffusers_names import CLASSES, EPS, depth_of, from_diffusers
from dig.sampling.published import file_kind, read_published, read_state
from dig.sampling.trained import HEADER, read_said
from dig.spec import ModelSpec
from dig.training.data.shards import LATENT_SCALE
from dig.training.saving import CheckpointError

CONFIG = "config.json"
INDEX = "model_index.json"
MODEL_FILE = "model.safetensors"
WEIGHTS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""Of diffusers' folder, the first that is there; the second is read without running what a pickle may hold."""
TRANSFORMER, VAE = "transformer", "vae"
HUB_FILES = (
    *(CONFIG, INDEX, MODEL_FILE, *WEIGHTS_FILES),
    *(f"{TRANSFORMER}/{name}" for name in (CONFIG, *WEIGHTS_FILES)),
    *(f"{VAE}/{name}" for name in (CONFIG, WEIGHTS_FILES[0])),
)
HUB_NEEDED = (MODEL_FILE, *WEIGHTS_FILES, *(f"{TRANSFORMER}/{name}" for name in WEIGHTS_FILES))
"""Of a name on the hub: what to fetch, and what must be among it."""
MAX_JSON = 2**24
"""Bytes; ImageNet's class names take 40,000."""
MOST = 2**31
DIT = "DiT"
_LIMITS = {
    "num_attention_heads": MOST, "attention_head_dim": MOST, "in_channels": MOST, "num_layers": 10_000,
    "sample_size": 2**16, "patch_size": 2**16,
}  # fmt: skip
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    # As diffusers saves Meta's weights by default; they were trained with 1e-6.
    "norm_eps": (EPS, 1e-5),
}
"""What every DiT's config.json says, where it says it at all."""


def weights_in(folder: Path) -> Path | None:
    """The file of weights in a folder, or in its pipeline's transformer; None where there is neither."""
    for inner in (folder, folder / TRANSFORMER):
        if (inner / CONFIG).is_file():
            for name in (*WEIGHTS_FILES, MODEL_FILE):
                if (inner / name).is_file():
                    return inner / name
    return None


def read_folder(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Weights of a folder.

    Returns:
        Their file, the state dict under this project's names, and what is known for `dig.sampling.trained.Trained`.

    Raises:
        CheckpointError: There are no weights, or they can't be used.
    """
    file = weights_in(folder)
    if file is None:
        raise CheckpointError(f"{folder} holds no weights beside a {CONFIG}")
    config = read_object(file.parent / CONFIG)
    if HEADER in config:
        return file, read_published(file).state, read_said(config[HEADER], file.parent / CONFIG)
    if config.get("_class_name") not in CLASSES:
        raise CheckpointError(
            f"{file.parent / CONFIG} is of {str(config.get('_class_name'))[:60]}; of diffusers' models only "
            f"{CLASSES[0]} is read"
        )
    return (file, *_read_dit(file, config))


def read_object(path: Path) -> dict[str, Any]:
    """An object of JSON. Raises CheckpointError on anything else."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_JSON))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    return content


def read_header(path: Path) -> dict[str, Any] | None:
    """What a safetensors file of ``python -m dig export`` says of itself; None of any other."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
        content = None if header is None else json.loads(header)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    return None if content is None else read_said(content, path)


def _read_dit(file: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = file.parent / CONFIG
    for name, most in _LIMITS.items():
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < most:
            raise CheckpointError(f"{path} says {name} {value!r:.60}, which no DiT has")
    for name, known in _FIXED.items():
        if config.get(name, known[0]) not in known:
            raise CheckpointError(f"{path} says {name} {config[name]!r:.60}; a DiT's is {known[0]!r}")
    side, patch, channels = config["sample_size"], config["patch_size"], config["in_channels"]
    if config.get("out_channels") != 2 * channels or side % patch:
        raise CheckpointError(
            f"{path} must have twice as many out_channels as in_channels, noise and covariance, and a sample_size of "
            f"whole patches; got {config.get('out_channels')}, {channels} and {side} by patches of {patch}"
        )
    said = read_header(file) if file_kind(file) == "safetensors" else None
    classes = said["spec"].num_classes if said is not None else None
    try:
        state = from_diffusers(read_state(file).state, (side // patch, side // patch), classes)
    except KeyError as error:
        raise CheckpointError(f"{file} lacks {error.args[0]}, which diffusers' {CLASSES[0]} has") from None
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read as diffusers' {CLASSES[0]}: {error}") from None
    if said is None:
        said = {"spec": _spec_of(file, state, config), "latent_scale": LATENT_SCALE}
        said["class_names"] = _names(file.parent.parent / INDEX, said["spec"].num_classes)
    return state, said | _beside(file.parent.parent)


def _spec_of(file: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModelSpec:
    """The model with these weights, by their shapes."""
    labels = state["y_embedder.embedding_table.weight"]
    shapes = {name: tensor.shape for name, tensor in state.items()}
    patch, channels, classes = config["patch_size"], config["in_channels"], len(labels) - 1
    found = models_of(shapes, patch, channels, classes, family=DIT) if classes > 0 else []
    width, depth, heads = labels.shape[1], depth_of(state, "blocks."), config["num_attention_heads"]
    if not found or width != heads * config["attention_head_dim"]:
        known = ", ".join(families()[DIT].sizes)
        raise CheckpointError(
            f"{file} is a DiT of {depth} blocks, width {width} and {heads} heads, in patches of {patch}; none of the "
            f"sizes {known} is that"
        )
    side = config["sample_size"]
    spec = ModelSpec(name=found[0], input_size=(side, side), in_channels=channels, num_classes=classes)
    return spec


def _names(index: Path, classes: int) -> tuple[str, ...]:
    """Class names from a pipeline's ``id2label``; none where it has none, or not one for each class."""
    content = read_object(index).get("id2label") if index.is_file() else None
    if not isinstance(content, dict) or set(content) != {str(label) for label in range(classes)}:
        return ()
    names = tuple(content[str(label)] for label in range(classes))
    return names if all(isinstance(name, str) for name in names) else ()


def _beside(pipeline: Path) -> dict[str, Any]:
    """What a pipeline's VAE adds: where it is, and what its latents are multiplied with."""
    folder = pipeline / VAE
    if not (pipeline / INDEX).is_file() or not (folder / CONFIG).is_file():
        return {}
    scale = read_object(folder / CONFIG).get("scaling_factor", LATENT_SCALE)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not (math.isfinite(scale) and scale > 0):
        raise CheckpointError(f"{folder / CONFIG} says scaling_factor {scale!r:.60}; it must be above 0")
    return {"vae": str(folder), "latent_scale": float(scale)}
