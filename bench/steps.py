"""The step that a case times: model, inputs, and one call that does the work, eagerly, compiled or as a CUDA graph."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.results import Case
from dig.graphs import on_capture_stream, record
from dig.layers import Backbone
from dig.registry import create_model

SEED = 0
WARMUP_STEPS = 2


def fill_zeros(model: nn.Module, std: float = 0.02) -> None:
    """Give every parameter that is zero throughout small random values.

    adaLN-Zero starts with gates of zero, so that half of a fresh model's backward pass multiplies zeros, which a GPU
    does faster and cooler than the numbers of a model in training.
    """
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A case made ready.

    Attributes:
        model: The model, on its device, weights in fp32.
        run: One step, with nothing prepared: the eager form.
        optimizer: Of a training step.
        inputs: SHA-256 of what the step is given.
    """

    model: Backbone
    run: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    inputs: str


def make_inputs(model: Backbone, batch: int) -> tuple[list[Tensor], str]:
    """Latents x, noise (both (B, C, h, w)), timesteps t and labels y (both (B,)), and their SHA-256; on the CPU.

    They are drawn by a generator of their own, on the CPU, from a fixed seed: every model of a comparison gets the same
    numbers on every device, whatever building it drew before.
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = (batch, model.in_channels, *model.input_size)
    inputs = [
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.randint(0, 1000, (batch,), generator=generator),
        torch.randint(0, model.num_classes, (batch,), generator=generator),
    ]
    digest = hashlib.sha256()
    for tensor in inputs:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return inputs, digest.hexdigest()


def check_output(output: Tensor, x: Tensor) -> Tensor:
    """What a model gives for x (B, C, h, w), or ValueError unless it is (B, 2C, h, w): less would be faster."""
    due, found = (len(x), 2 * x.shape[1], *x.shape[2:]), tuple(getattr(output, "shape", ()))
    if found != due:
        raise ValueError(f"the model gives {found or type(output).__name__} for x {tuple(x.shape)}; {due} is due")
    return output


def build_step(case: Case) -> Step:
    """Model, inputs and the step of a case, on its device.

    The training step zeroes gradients, runs forward and backward under autocast and a fused AdamW step. The loss reads
    every output channel, so that no gradient is zero.
    """
    torch.manual_seed(SEED)
    device = torch.device(case.device)
    with device:
        options: dict[str, Any] = dict(case.options)
        model = create_model(case.model, image_size=case.resolution, **options)
    model.to(device)
    fill_zeros(model)
    inputs, digest = make_inputs(model, case.batch)
    x, noise, t, y = (tensor.to(device) for tensor in inputs)
    network: Callable[..., Tensor] = torch.compile(model) if case.execution == "compile" else model

    def autocast() -> contextlib.AbstractContextManager[object]:
        if case.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(case.device, dtype=torch.bfloat16)

    if case.mode == "forward":
        model.eval()

        def forward() -> Tensor:
            with torch.no_grad(), autocast():
                return check_output(network(x, t, y), x)

        return Step(model=model, run=forward, inputs=digest)

    model.train()
    optimizer = torch.optim.AdamW(
        # Capturable also where the case is eager: its step is replayed as a graph beside it, by the same fused kernel.
        model.parameters(),
        lr=1e-4,
        weight_decay=0.0,
        fused=True,
        capturable=case.device == "cuda" and case.execution != "compile",
    )

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            output = check_output(network(x, t, y), x)
        predicted, covariance = output.float().chunk(2, dim=1)
        loss = F.mse_loss(predicted, noise) + covariance.square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Step(model=model, run=train, optimizer=optimizer, inputs=digest)


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
    """Run what is within on the one stream that this process captures on, and wait for it; nothing on a CPU."""
    return on_capture_stream(torch.device(device))
