"""Low-rank adapters by peft (arXiv 2106.09685): attached to a model in training, written as peft's folder, merged.

An adapter adds ``B A`` to a linear layer's weight, B (out, r) and A (r, in); B begins as zeros. The layers themselves
are frozen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from dig.layers import Backbone
from dig.packages import require
from dig.training.config import TrainConfig
from dig.training.data.files import write_atomically
from dig.training.freezing import matching

FOLDER = "adapter"
"""Of a run: its adapter."""
WEIGHTS_NAME, CONFIG_NAME, ABOUT_NAME = "adapter_model.safetensors", "adapter_config.json", "dig.json"
"""Files of an adapter's folder; the last one is this project's own, and may be missing."""
TARGETS = ("*block*",)
"""The linear layers that get an adapter unless others are named: all of every block."""
_PREFIX = "base_model.model."


def attach(model: Backbone, *, rank: int, targets: Sequence[str], whole: Sequence[str]) -> Any:
    """Put adapters into a model, in place, and freeze everything else.

    Args:
        model: Whose linear layers get them.
        rank: r; outputs are added as they are (alpha is r).
        targets: Patterns of names of linear layers.
        whole: Names of modules that are trained themselves: a label table with new rows.

    Returns:
        peft's model around it.

    Raises:
        ValueError: A pattern matches no linear layer.
        MissingPackageError: peft is not installed.
    """
    peft = require("peft", "--lora")
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    names = matching(linears, targets, option="--lora-target", what="linear layer")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, modules_to_save=list(whole) or None)
    return peft.get_peft_model(model, config)


@dataclass(frozen=True, kw_only=True)
class About:
    """What an adapter doesn't say of itself as peft writes it.

    Attributes:
        model: Name of the model.
        input_size: (H, W).
        class_names: Of each label.
        loss: What it was trained with.
        base_sha256: Of the file that it adapts.
        step: Steps it was trained for.
        label_dropout: Share of labels replaced by the null label.
        batch: Images a step.
    """

    model: str
    input_size: tuple[int, int]
    class_names: tuple[str, ...]
    loss: str
    base_sha256: str
    step: int
    label_dropout: float
    batch: int


def write_adapter(folder: Path, adapted: Any, state: Mapping[str, Tensor], config: TrainConfig, step: int) -> None:
    """Write an adapter as peft's folder.

    Args:
        folder: Made if it is not there.
        adapted: By `attach`.
        state: State dict of the model with adapters: its averages, say.
        config: The run.
        step: Steps that lie behind.

    Raises:
        OSError: It can't be written.
    """
    peft = require("peft", "--lora")
    named = {f"{_PREFIX}{name}": tensor for name, tensor in state.items()}
    tensors = peft.get_peft_model_state_dict(adapted, state_dict=named)
    content = adapted.peft_config["default"].to_dict()
    content = {name: sorted(value) if isinstance(value, set) else value for name, value in content.items()}
    about = About(
        model=config.model.name,
        input_size=config.model.input_size,
        class_names=config.data.class_names,
        loss=config.loss,
        base_sha256=config.init,
        step=step,
        label_dropout=config.label_dropout,
        batch=config.batch,
    )
    folder.mkdir(exist_ok=True)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS_NAME, save(held, {"format": "pt"}))
    write_atomically(folder / CONFIG_NAME, _json({**content, "inference_mode": True}))
    write_atomically(folder / ABOUT_NAME, _json(asdict(about)))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, default=str) + "\n").encode()


def merged_state(model: Backbone, config: TrainConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain state dict of a model with adapters: each linear layer's weight with its adapter added.

    Args:
        model: As `dig.spec.ModelSpec.build` gives it; changed.
        config: The run.
        state: Of the model with adapters.

    Raises:
        RuntimeError: It is another model's.
    """
    adapted = attach(model, rank=config.lora, targets=config.lora_targets, whole=config.lora_whole)
    model.load_state_dict(state)
    merged: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
    return merged
