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
from dig.memory import available_memory, check_memory
from dig.meta import on_meta
from dig.registry import parse_name
from dig.spec import ModelSpec
from dig.training.activations import Saved, count_saved, without_memory
from dig.training.config import TrainConfig
from dig.training.inputs import AHEAD
from dig.training.step import stop_dropping_labels

FP32 = 4
MAX_CLASSES = 2**31
WORKING_BLOCKS = 2
"""How many blocks' saved tensors the backward pass' own results and the allocator's gaps come to."""
PYTORCH = 2**27
"""Bytes of libraries and threads that the first step brings."""
MOST_SAVED = 1000
"""How many times the floor of its activations a model may save: DiS' reference 240 times."""
MOST_PARTS = 4096


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
        with on_meta():
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
    with on_meta():
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
    with on_meta():
        model = _sibling(spec).train()
    stop_dropping_labels(model)
    with FakeTensorMode(allow_non_fake_inputs=True):  # No memory, as on ``meta``, but autocast works.
        inputs = torch.empty(1, spec.in_channels, *model.input_size), torch.empty(1), torch.empty(1, dtype=torch.int64)
        with _Draws() as draws, suppress(Exception):  # A model that reads values finds none here.
            torch.func.functional_call(model, without_memory(model), inputs)
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


def training_needs(
    config: TrainConfig, *, least: bool = False, ranks: int = 1, sharded: bool = False
) -> dict[str, int]:
    """What for → bytes that a run needs on each device: on a CPU an estimate, on a GPU a floor, as of `step_needs`.

    A GPU says that its memory is full; a process that takes all of a host's is killed and says nothing. So there,
    activations are what the model saves for its backward pass (`dig.training.activations`), with `WORKING_BLOCKS`
    blocks' worth again for the backward pass' own results.

    Args:
        config: The run.
        least: Whether a floor will do on a CPU too, which is quicker.
        ranks: Devices that share a step's batch.
        sharded: Whether they share the model's state too.
    """
    model = Footprint.of(config.model)
    number = 2 if config.dtype == "bf16" else FP32
    at_once = config.batch // config.accumulate // ranks
    needs = step_needs(model, trained=model.parameters, at_once=at_once, number=number)
    if config.lora or config.freeze:
        # Of frozen weights there is neither; how many those are isn't known before the model is built.
        needs |= {"gradients": 0, "optimizer": 0}
    noise = 2 * FP32 * config.batch // ranks * model.values
    needs |= {
        "average": FP32 * (model.parameters + model.constants),
        "batches and their noise": (AHEAD + 1) * noise,
    }
    if sharded:
        needs |= {name: needs[name] // ranks for name in ("weights", "gradients", "optimizer", "average")}
    if config.device != "cpu":
        # There the others wait in the host's memory.
        return {**needs, "batches and their noise": noise}
    saved = None if least else _saved(config)
    if saved is None:
        return needs
    block = saved.each * at_once // saved.blocks
    if config.checkpoint_blocks:
        activations = needs["activations"] + saved.once + block
    else:
        activations = saved.once + saved.each * at_once
    return {**needs, "activations": activations, "working memory": WORKING_BLOCKS * block + PYTORCH}


_saved_by: dict[str, Saved | None] = {}


def _saved(config: TrainConfig) -> Saved | None:
    """What the run's model saves, counted once a process."""
    key = f"{config.model!r} {config.dtype}"
    if key not in _saved_by:
        _saved_by[key] = count_saved(config.model, bf16=config.dtype == "bf16")
    return _saved_by[key]


def check_training(config: TrainConfig, *, ranks: int = 1, sharded: bool = False) -> None:
    """Raise `dig.memory.TooLargeError` where a run needs more memory than there is; it says which batch would fit.

    Args:
        config: The run.
        ranks: As of `training_needs`.
        sharded: Likewise.
    """
    if config.device == "cpu":
        least = training_needs(config, least=True, ranks=ranks, sharded=sharded)
        if sum(least.values()) + MOST_SAVED * least["activations"] <= available_memory("cpu"):
            return  # Counting takes seconds.
        needs = training_needs(config, ranks=ranks, sharded=sharded)
        estimate = "working memory" in needs
        check_memory(needs, device="cpu", advice=_what_fits(config, ranks, sharded), estimate=estimate)
        return
    advice = "try a smaller model, image size or --batch, or a larger --accumulate"
    check_memory(training_needs(config, ranks=ranks, sharded=sharded), device=config.device, advice=advice)
    values = math.prod(config.model.sample_shape)
    ahead = {"batches and their noise": (AHEAD + 1) * 2 * FP32 * config.batch // ranks * values}
    check_memory(ahead, device="cpu", advice="try a smaller image size or --batch")


def _what_fits(config: TrainConfig, ranks: int, sharded: bool) -> str:
    """Which batch fits into the host's memory, in words."""
    free = available_memory("cpu")

    def fits(batch: int, parts: int = 1) -> bool:
        changed = dataclasses.replace(config, batch=batch, accumulate=parts)
        return sum(training_needs(changed, ranks=ranks, sharded=sharded).values()) <= free

    smaller = "try a smaller model or image size"
    if not fits(1):
        return smaller if config.checkpoint_blocks else f"not even --batch 1 fits; {smaller}, or --checkpoint-blocks"
    # What is needed rises with the batch.
    low, high = 1, config.batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    parts = next(
        (n for n in range(2, min(config.batch, MOST_PARTS) + 1) if config.batch % n == 0 and fits(config.batch, n)), 0
    )
    return f"--batch {low} would fit" + (f", or this --batch with --accumulate {parts}" if parts else "")


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
