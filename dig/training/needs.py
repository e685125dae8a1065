"""What a model needs at least, in training and in sampling: computed before anything of that size is made.

Shapes: B samples at once, T tokens, D width, C channels, H rows, W columns of the model's input.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dig.family import BACKEND
from dig.layers import Backbone
from dig.memory import check_memory
from dig.registry import parse_name
from dig.spec import ModelSpec
from dig.training.config import TrainConfig
from dig.training.inputs import AHEAD
from dig.training.step import stop_dropping_labels

FP32 = 4
MAX_CLASSES = 2**31


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """How large a model is.

    Attributes:
        parameters: Numbers in its weights that are trained.
        constants: Numbers beside them: the embedding of positions.
        depth: Blocks.
        width: D; 0 where it can't be told from the weights' shapes.
        tokens: T.
        values: C H W.
    """

    parameters: int
    constants: int
    depth: int
    width: int
    tokens: int
    values: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Footprint:
        """Of a model that isn't built: only its smallest sibling is, of one patch, without memory.

        Raises:
            ValueError: No such model.
        """
        patch = parse_name(spec.name)[2]
        if spec.num_classes >= MAX_CLASSES or max(spec.input_size) >= MAX_CLASSES or spec.in_channels >= MAX_CLASSES:
            raise ValueError(f"{spec.describe()} is beyond any machine: sizes and classes must be below 2^31")
        with torch.device("meta"):
            model = _sibling(spec)
        patches = next((p.shape for p in model.parameters() if p.ndim == 4), torch.Size())
        depth = sum(len(child) for child in model.children() if isinstance(child, torch.nn.ModuleList))
        width = patches[0] if patches else 0
        tokens = math.prod(side // patch for side in spec.input_size)
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            constants=tokens * width,
            depth=depth,
            width=width,
            tokens=tokens,
            values=math.prod(spec.sample_shape),
        )


def _sibling(spec: ModelSpec) -> Backbone:
    """The model for an input of one patch, on the backend that runs anywhere."""
    patch = parse_name(spec.name)[2]
    # A backend changes no weight, and might not be there to build from.
    options = {name: value for name, value in spec.options.items() if name != BACKEND}
    return dataclasses.replace(spec, input_size=(patch, patch), options=options).build()


def count_parameters(spec: ModelSpec) -> int:
    """How many numbers are trained in a model that isn't built: of any backend, which changes no weight."""
    options = {name: value for name, value in spec.options.items() if name != BACKEND}
    with torch.device("meta"):
        model = dataclasses.replace(spec, options=options).build()
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class _Draws(TorchDispatchMode):
    """Notices operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let it run."""
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def draws_in_training(spec: ModelSpec) -> bool:
    """Whether a model draws random numbers in training, beside labels to drop; found on its smallest sibling."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # No memory, as on ``meta``, but autocast works.
        model = _sibling(spec).train()
        stop_dropping_labels(model)
        x = torch.empty(1, spec.in_channels, *model.input_size)
        with _Draws() as draws, suppress(Exception):  # A model that reads values finds none here.
            model(x, torch.empty(1), torch.empty(1, dtype=torch.int64))
    return draws.found


def step_needs(model: Footprint, *, trained: int, at_once: int, number: int, weight: int = FP32) -> dict[str, int]:
    """What for → bytes that one step of a model needs on its device at least.

    Activations are counted as one input of each block, which is what `checkpoint_blocks` keeps; of a pass without
    gradients as one block's input and output.

    Args:
        model: Its size.
        trained: Numbers that are trained, by AdamW in fp32; 0 for a pass without gradients.
        at_once: B.
        number: Bytes of an activation.
        weight: Bytes of a weight.
    """
    needs = {
        "weights": weight * (model.parameters + model.constants),
        "gradients": FP32 * trained,
        "optimizer": 2 * FP32 * trained,
        "activations": number * at_once * (model.depth if trained else 2) * model.tokens * model.width,
    }
    return {name: size for name, size in needs.items() if size or trained}


def training_needs(config: TrainConfig) -> dict[str, int]:
    """What for → bytes that a run needs on its device at least, as of `step_needs`."""
    model = Footprint.of(config.model)
    number = 2 if config.dtype == "bf16" else FP32
    needs = step_needs(model, trained=model.parameters, at_once=config.batch // config.accumulate, number=number)
    if config.lora or config.freeze:
        # Of frozen weights there is neither; how many those are isn't known before the model is built.
        needs |= {"gradients": 0, "optimizer": 0}
    return {
        **needs,
        "average": FP32 * (model.parameters + model.constants),
        "a batch and its noise": 2 * FP32 * config.batch * model.values,
    }


def check_training(config: TrainConfig) -> None:
    """Raise `dig.memory.TooLargeError` where a run needs more memory than there is."""
    advice = "try a smaller model, image size or --batch, or a larger --accumulate"
    check_memory(training_needs(config), device=config.device, advice=advice)
    if config.device != "cpu":
        values = math.prod(config.model.sample_shape)
        ahead = {"batches and their noise": (AHEAD + 1) * 2 * FP32 * config.batch * values}
        check_memory(ahead, device="cpu", advice="try a smaller image size or --batch")


def check_sampling(model: Footprint, *, device: str, at_once: int, noises: int = 0) -> None:
    """Raise `dig.memory.TooLargeError` where sampling needs more memory than there is.

    Args:
        model: Its size.
        device: Where it runs.
        at_once: B, with guidance twice the samples.
        noises: Steps whose noise is held.
    """
    needs = {
        "weights": FP32 * (model.parameters + model.constants),
        # A block's input and output, in bf16 at least.
        "activations": 2 * 2 * at_once * model.tokens * model.width,
        "samples and their noise": FP32 * at_once * model.values * (2 + noises),
    }
    check_memory(needs, device=device, advice="try a smaller --model-batch or --image-size")
