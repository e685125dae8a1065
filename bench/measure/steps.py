"""The step that a case times: model, inputs, and one call that does the work, eagerly, compiled or as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cases.case import Case
from bench.parity.compiling import compile_options
from bench.parity.inputs import SEED, check_output, fill_zeros, make_inputs, refuse_zeros
from dig.graphs import on_capture_stream, record
from dig.layers import Backbone
from dig.spec import create_model

WARMUP_STEPS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A case made ready.

    Attributes:
        model: The model, on its device.
        run: One step, not captured: eager or compiled.
        loss: Of a training step: the loss, with its graph; nothing is moved.
        optimizer: Of a training step.
        tensors: What the step reads: x, noise, t and y, always the same memory.
        inputs: SHA-256 of what the step is given.
    """

    model: Backbone
    run: Callable[[], Tensor]
    loss: Callable[[], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    inputs: str

    def give(self, inputs: list[Tensor]) -> None:
        """Let the step read other values; shapes as in `make_inputs`."""
        for tensor, value in zip(self.tensors, inputs, strict=True):
            tensor.copy_(value)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of the classes that a model keeps in lists: its blocks, wherever they are. Outermost ones only."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    kinds = {type(member) for members in lists for member in members}
    found = [module for module in model.modules() if type(module) in kinds]
    inner = {id(part) for block in found for part in block.modules() if part is not block}
    return [block for block in found if id(block) not in inner]


def compile_parts(model: nn.Module, *, scope: str, max_autotune: bool = False) -> None:
    """Compile a model in place: as a whole (scope ``model``), or each of its blocks (``block``).

    Raises:
        ValueError: It is to be compiled by block, and keeps none in a list.
    """
    options = compile_options(max_autotune=max_autotune)
    parts = [model] if scope == "model" else repeated_blocks(model)
    if not parts:
        raise ValueError(f"{type(model).__name__} keeps no blocks in a ModuleList; compile it with scope model")
    for part in parts:
        part.compile(**options)


class Ready(Protocol):
    """What a model is made ready by: a `Case`, or a case of sampling."""

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def options(self) -> tuple[tuple[str, str], ...]: ...  # noqa: D102
    @property
    def resolution(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def weights(self) -> str: ...  # noqa: D102


def build_model(case: Ready, *, input_size: tuple[int, int] | None = None) -> Backbone:
    """A model of random weights without zeros, on its device, cast where the case says so; not compiled yet.

    Args:
        case: Which model; its resolution is that of a square image.
        input_size: Height and width of the latent, where it is not square.

    Raises:
        ParityError: Weights are mostly zeros.
    """
    torch.manual_seed(SEED)
    device = torch.device(case.device)
    options: dict[str, Any] = dict(case.options)
    with device:
        side = case.resolution if input_size is None else None
        model = create_model(case.model, image_size=side, input_size=input_size, **options)
    # Position embeddings are made by NumPy, which knows of no device.
    model.to(device)
    fill_zeros(model)
    refuse_zeros(model.named_parameters())
    return model.to(DTYPES[case.weights])


def build_step(case: Case) -> Step:
    """Model, inputs and the step of a case, on its device.

    The training step zeroes gradients, runs forward and backward under autocast and a fused AdamW step. The loss reads
    every output channel, so that no gradient is zero. With weights in bf16 there is no autocast: the model was cast.

    Raises:
        ParityError: Weights are mostly zeros.
    """
    return step_of(build_model(case), case)


def step_of(model: Backbone, case: Case) -> Step:
    """`build_step` of a model that is there, on the case's device; it is changed: compiled, trained."""
    given = given_to(model, case)
    if case.compiles:
        compile_parts(model, scope=case.scope, max_autotune=case.max_autotune)
    if case.mode == "train":
        return training_step(model, model, case, given)
    model.eval()
    x, _, t, y = given.tensors

    def forward() -> Tensor:
        with torch.no_grad(), _autocast(case):
            return check_output(model(x, t, y), x)

    return Step(model=model, run=forward, tensors=given.tensors, inputs=given.digest)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a step reads: x, noise, t and y on its device, and their SHA-256."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    digest: str


def given_to(model: Backbone, case: Case, *, seed: int = SEED) -> Given:
    """Inputs of a case's step, drawn with a seed: ranks of one job have one each.

    Raises:
        ParityError: They are mostly zeros.
    """
    device, cast = torch.device(case.device), DTYPES[case.weights]
    values, digest = make_inputs(model, case.batch, seed=seed)
    x, noise, t, y = values[0].to(device, cast), values[1].to(device), values[2].to(device), values[3].to(device)
    refuse_zeros([("x", x), ("the noise", noise)])
    return Given(tensors=(x, noise, t, y), digest=digest)


def _autocast(case: Case) -> contextlib.AbstractContextManager[object]:
    if case.dtype == "fp32" or case.weights == "bf16":
        return contextlib.nullcontext()
    return torch.autocast(case.device, dtype=torch.bfloat16)


def loss_of(network: Callable[..., Tensor], case: Case, given: Given) -> Callable[[], Tensor]:
    """The loss of a training step, with its graph; it reads every output channel, so that no gradient is zero."""
    x, noise, t, y = given.tensors

    def loss() -> Tensor:
        with _autocast(case):
            output = check_output(network(x, t, y), x)
        predicted, covariance = output.float().chunk(2, dim=1)
        return F.mse_loss(predicted, noise) + covariance.square().mean()

    return loss


def training_step(model: Backbone, network: Callable[..., Tensor], case: Case, given: Given) -> Step:
    """The training step of a model that is compiled already, where the case compiles.

    Args:
        model: Whose parameters the optimizer moves.
        network: What is called: the model, or what several processes wrap it in.
        case: A training case.
        given: What the step reads.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        # Capturable also where the case is eager: its step is replayed as a graph beside it, by the same fused kernel.
        model.parameters(),
        lr=1e-4,
        weight_decay=0.0,
        fused=True,
        capturable=case.device == "cuda" and case.execution != "compile",
    )

    loss = loss_of(network, case, given)

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = loss()
        total.backward()
        optimizer.step()
        return total.detach()

    return Step(model=model, run=train, loss=loss, optimizer=optimizer, tensors=given.tensors, inputs=given.digest)


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The whole step as one CUDA graph: its replay, and the tensor that each replay writes its result to.

    The step must have run before, so that kernels are tuned and optimizer states exist.
    """
    graph, result = record(run)
    return graph.replay, result


def warm_up(run: Callable[[], Tensor], device: str) -> None:
    """Run a few steps on the stream that capturing afterwards takes."""
    with capture_stream(device):
        for _ in range(WARMUP_STEPS):
            run()


def capture_stream(device: str) -> contextlib.AbstractContextManager[None]:
    """Run the body on the one stream that this process captures on, and wait for it; does nothing on a CPU."""
    return on_capture_stream(torch.device(device))
