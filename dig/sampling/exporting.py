"""Weights written for others: diffusers' folder, one safetensors file, the authors' names; read back to the same bits.

A folder is made under another name and renamed when it is whole; a file likewise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from dig.checkpoints import to_release
from dig.layers import Backbone
from dig.meta import on_meta
from dig.packages import quietly, require
from dig.registry import parse_name
from dig.sampling.diffusers_names import CLASSES, NULL_LABEL, config_of, to_diffusers
from dig.sampling.folders import CONFIG, DIT, INDEX, MODEL_FILE, TRANSFORMER, VAE, WEIGHTS_FILES
from dig.sampling.trained import HEADER
from dig.sampling.weights import Weights
from dig.training.data.files import making_folder, replacing

Format = Literal["diffusers", "safetensors", "release"]
SUFFIXES: Mapping[str, tuple[str, ...]] = {"safetensors": (".safetensors",), "release": (".pt", ".pth", ".safetensors")}
"""Of the one file of a format; ``--out`` without one is a folder for it."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        path: The folder or the file.
        notes: What whoever loads it has to know, a sentence each.
    """

    path: Path
    notes: tuple[str, ...] = ()


def export(weights: Weights, out: Path, *, format: Format, vae: Any = None) -> Exported:
    """Write weights in a format.

    Args:
        weights: What to write.
        out: A folder that is not there yet or empty; of a format of one file, that file too.
        format: ``diffusers``, ``safetensors`` or ``release``.
        vae: For a pipeline in diffusers' format, an ``AutoencoderKL``, whose scale becomes the model's.

    Raises:
        CheckpointError: The weights are not of their model.
        ValueError: They have no such format, or something lies where they would be written.
        OSError: They can't be written.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}; got {format!r}")
    model = weights.build("cpu")
    if vae is not None and not (format == "diffusers" and _is_dit(weights)):
        raise ValueError("--vae is of a DiT in diffusers' format, whose pipeline it becomes a part of")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    header = {HEADER: json.dumps(weights.to_json())}
    if format == "diffusers":
        if _is_dit(weights):
            return _pipeline(weights, model, state, header, out, vae)
        with making_folder(out) as made:
            # Read by dig.load; the format that diffusers has for a model that it doesn't know.
            config = {"_class_name": type(model).__name__, "library_name": "dig-diffusion", HEADER: weights.to_json()}
            _write_json(made / CONFIG, config)
            save_file(state, made / MODEL_FILE, {"format": "pt", **header})
        return Exported(path=out)
    if format == "release":
        # DiT's and DiS' names are the published ones already.
        state = to_release(state) if parse_name(weights.spec.name)[0].name == "DiG" else state
    file = out if out.suffix.lower() in SUFFIXES[format] else out / ("model.pt" if format == "release" else MODEL_FILE)
    if file.exists():
        raise ValueError(f"{file} exists; choose another --out, or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix.lower() == ".safetensors":
        with replacing(file) as temporary:
            save_file(state, temporary, {"format": "pt", **header})
        return Exported(path=file)
    with replacing(file) as temporary:
        torch.save(state, temporary)
    words = [f"{name}={word}" for name, word in weights.to_json()["model"]["options"].items()]
    size = f" --image-size {weights.image_size[0]} --num-classes {weights.num_classes}"
    name = ":".join([weights.spec.name, *words])
    return Exported(path=file, notes=(f"it does not say what it is: sample it with --model {name}{size}",))


def _is_dit(weights: Weights) -> bool:
    """Whether diffusers has this model: DiT, on whichever attention."""
    return parse_name(weights.spec.reference().name)[0].name == DIT


def _pipeline(
    weights: Weights, model: Backbone, state: Mapping[str, Tensor], header: dict[str, str], out: Path, vae: Any
) -> Exported:
    """A folder that ``DiTPipeline.from_pretrained`` loads, or its transformer and scheduler alone."""
    if weights.loss != "hybrid":
        raise ValueError(
            f"this model was trained with the loss {weights.loss}, which DiTPipeline has no scheduler for; "
            "use --format safetensors"
        )
    if model.grid[0] != model.grid[1]:
        raise ValueError(f"diffusers' DiT takes square inputs; this one takes {model.input_size}")
    diffusers = require("diffusers", "export --format diffusers")
    config = cast(Any, model).config
    arguments = config_of(
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        side=model.input_size[0],
        channels=model.in_channels,
        patch=model.patch_size,
        classes=model.num_classes,
    )
    renamed = to_diffusers(state, model.grid)
    with quietly(), on_meta():
        transformer = diffusers.DiTTransformer2DModel(**arguments)
    _check_same(renamed, transformer.state_dict())
    # Trailing timesteps begin at pure noise, as training does and this project's samplers.
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    index: dict[str, Any] = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDIMScheduler"],
        TRANSFORMER: ["diffusers", CLASSES[0]],
    }
    if weights.class_names:
        index["id2label"] = {str(label): name for label, name in enumerate(weights.class_names)}
    with making_folder(out) as made, quietly():
        (made / TRANSFORMER).mkdir()
        transformer.save_config(made / TRANSFORMER)
        save_file(renamed, made / TRANSFORMER / WEIGHTS_FILES[0], {"format": "pt", **header})
        scheduler.save_config(made / "scheduler")
        if vae is not None:
            index[VAE] = ["diffusers", "AutoencoderKL"]
            vae.register_to_config(scaling_factor=weights.latent_scale)
            vae.save_pretrained(made / VAE)
        _write_json(made / INDEX, index)
    return Exported(path=out, notes=tuple(_notes(weights, vae)))


def _notes(weights: Weights, vae: Any) -> Iterator[str]:
    if not weights.latent:
        yield f"it works on pixels: load it with {CLASSES[0]}, for DiTPipeline takes latents and a VAE"
    elif vae is None:
        yield (
            "it has no VAE: DiTPipeline.from_pretrained(FOLDER, vae=AutoencoderKL.from_pretrained(...)) needs one; "
            "--vae puts it in"
        )
    if weights.num_classes > NULL_LABEL:
        yield f"DiTPipeline takes class {NULL_LABEL} for no class, which is one of these: use guidance_scale=1"
    yield (
        "diffusers embeds timesteps at other frequencies than DiT was trained with; "
        "dig.match_frequencies(pipeline.transformer) puts that right"
    )


def _check_same(renamed: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise ValueError where diffusers' model of today has other tensors than those that are written."""
    ours = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    if other := sorted(name for name in ours.keys() | wanted.keys() if ours.get(name) != wanted.get(name)):
        raise ValueError(f"this version of diffusers has another DiT: {other[0]} is not as it was; pin 0.42.1")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
