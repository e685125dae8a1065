"""Any number of samples, in batches that are saved as they are done; each the same however they are cut.

A sample's noise is a function of the seed and its index, and so is its place in the model's batch: sample i is always
at place ``i % M`` of the batch i // M that the model takes, M fixed, with all of its neighbours, wanted or not. So the
model runs the same kernels on the same shapes for it, and its bits do not depend on how many samples were asked for,
from which index on, how many are saved at a time, or where a run was interrupted.

Shapes: N samples, M samples that the model takes at once, C channels, h and w of the model's space, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dig.diffusion import (
    Denoiser,
    SamplerName,
    SamplingLoop,
    build_solver,
    check_finite,
    initial_noise,
    step_noise,
)
from dig.graphs import Captured, CaptureError, capture
from dig.layers import Backbone, CfgChannels
from dig.sampling.images import to_pixels

TOKENS_AT_ONCE = {"cuda": 2**15, "cpu": 2**10}
"""About so many tokens fill a device."""
MODEL_BATCH = {"cuda": 256, "cpu": 16}
"""No more samples at once than this, however small they are."""
Precision = Literal["bf16", "autocast", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MAX_INDEX = 2**62
"""Samples are numbered below this: with the batch that they lie in, they fit a word."""


def default_precision(device: str, *, cast: bool) -> Precision:
    """What samples fastest at bf16's accuracy on ``cuda`` or ``cpu``.

    Args:
        device: Where.
        cast: Whether the model may be, or was, cast to bf16. Autocast casts fp32 weights at every step of the sampler.
    """
    if cast:
        return "bf16"
    return "autocast" if device == "cuda" else "fp32"


def default_model_batch(tokens: int, device: str) -> int:
    """M for a model of so many tokens on a device."""
    return max(1, min(MODEL_BATCH[device], TOKENS_AT_ONCE[device] // tokens))


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """What is sampled.

    Attributes:
        classes: Labels, taken in turn: sample i is of ``classes[i % len(classes)]``.
        count: N.
        first: Index of the first sample.
        sampler: ``ddpm``, ``ddim``, ``dpm-solver++``, or ``euler``.
        steps: Sampling steps; None for the sampler's own default.
        eta: Share of noise of ``ddim``.
        cfg_scale: Guidance; 1 is none.
        cfg_channels: Which noise channels are guided.
        seed: Of the noise.
        model_batch: M.
        precision: ``bf16``: the model was cast to it; ``autocast``: it runs in bf16 autocast; ``fp32``.
    """

    classes: tuple[int, ...]
    count: int
    first: int = 0
    sampler: SamplerName = "ddim"
    steps: int | None = None
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: CfgChannels = "three"
    seed: int = 0
    model_batch: int
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        """Raise ValueError on what cannot be sampled."""
        # By the names that callers know them by: `dig.sample`'s.
        for name, value in (("samples", self.count), ("model_batch", self.model_batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.first < 0:
            raise ValueError(f"first must be 0 or more; got {self.first}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be 0 to 2^64 - 1; got {self.seed}")
        if max(self.first + self.count, self.model_batch) > MAX_INDEX:
            raise ValueError(f"samples are numbered to 2^62; got {self.count} from {self.first} on")
        for name, number in (("cfg", self.cfg_scale), ("eta", self.eta)):
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(f"{name} must be a finite number, 0 or more; got {number}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"dtype must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}; got {self.precision!r}")
        if self.cfg_channels not in get_args(CfgChannels):
            raise ValueError(f"cfg_channels must be {' or '.join(get_args(CfgChannels))}; got {self.cfg_channels!r}")
        if not self.classes:
            raise ValueError("no classes to sample")
        # Its steps and eta are checked where it is built: here, before any weight is read.
        build_solver(self.sampler, steps=self.steps, eta=self.eta)

    def labels(self, indices: range) -> list[int]:
        """Label of each sample."""
        return [self.classes[i % len(self.classes)] for i in indices]


class BatchSampler:
    """Samples by index, M at once.

    Args:
        model: In eval mode, on ``device``.
        plan: What is sampled; its ``count`` and ``first`` say which samples must be finite.
        device: Where.
        graph: Whether the whole loop over the steps is one CUDA graph.
        finish: What becomes of a batch (M, C, h, w) of the model's: `to_pixels`, say, after a VAE. It too always
            sees whole batches.

    Attributes:
        report: Told how many wanted samples a batch has brought, where somebody follows.

    Raises:
        ValueError: The model's weights are not what the plan's precision says.
    """

    def __init__(
        self,
        model: Backbone,
        plan: SamplePlan,
        device: torch.device,
        *,
        graph: bool = False,
        finish: Callable[[Tensor], NDArray[Any]] = to_pixels,
    ) -> None:
        cast = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        if cast != (plan.precision == "bf16"):
            raise ValueError(
                "the model's weights are bf16: sample it with dtype bf16"
                if cast
                else "dtype bf16 is of a model that was cast: model.to(torch.bfloat16), or sample with dtype autocast"
            )
        self.plan = plan
        self.report: Callable[[int], object] | None = None
        self._finish = finish
        self.device = device
        self.num_classes = model.num_classes
        self._shape = (model.in_channels, *model.input_size)
        self._solver = build_solver(plan.sampler, steps=plan.steps, eta=plan.eta)
        denoiser = Denoiser(
            model=model,
            cfg_scale=plan.cfg_scale,
            cfg_channels=plan.cfg_channels,
            dtype=torch.bfloat16 if plan.precision == "autocast" else None,
        )
        self._loop = SamplingLoop(denoiser, self._solver, device=device)
        self._captures = graph
        self._captured: Captured[Tensor] | None = None
        self._last: tuple[int, NDArray[Any]] | None = None

    def batch(self, number: int) -> NDArray[Any]:
        """The samples ``number * M`` to ``(number + 1) * M - 1``, finished: (M, ...).

        Raises:
            NotFiniteError: The model's samples are not finite.
        """
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        M = self.plan.model_batch
        indices = range(number * M, (number + 1) * M)
        x_T = initial_noise(self.plan.seed, indices, self._shape).to(self.device)
        y = torch.tensor(self.plan.labels(indices), device=self.device)

        def noises() -> Iterator[Tensor]:
            for step in range(self._solver.noises):
                yield step_noise(self.plan.seed, indices, self._shape, step).to(self.device)

        x = self._replay(x_T, y, noises()) if self._captures else self._loop.run(x_T, y, noises())
        wanted = self._wanted(indices)
        check_finite(
            x[wanted],
            indices[wanted],
            lambda observe: self._loop.run(x_T, y, noises(), observe=lambda step, state: observe(step, state[wanted])),
        )
        # Whatever is not asked for only fills the batch.
        finished = self._finish(x if len(indices[wanted]) == M else x.nan_to_num(0, 0, 0))
        self._last = (number, finished)
        if self.report is not None:
            self.report(len(indices[wanted]))
        return finished

    def _wanted(self, indices: range) -> slice:
        """Which of a batch's samples the plan asks for; all of them where it asks for none."""
        start = max(self.plan.first, indices.start)
        stop = min(self.plan.first + self.plan.count, indices.stop)
        return slice(start - indices.start, stop - indices.start) if start < stop else slice(None)

    def _replay(self, x_T: Tensor, y: Tensor, noises: Iterator[Tensor]) -> Tensor:
        noise = torch.stack(list(noises)) if self._solver.noises else None
        if self._captured is None:
            try:
                self._captured = capture(self._loop.run, x_T, y, noise, warm_up=self._first_step)
            except CaptureError as error:
                raise CaptureError(f"{error}; or sample with execution eager") from error
        return self._captured(x_T, y, noise)

    @property
    def steps(self) -> int:
        """Steps of the sampler: passes of the model to a batch."""
        return len(self._loop.timesteps)

    def one_step(self) -> None:
        """One pass of the model over a batch, eagerly, waited for: to see what it takes."""
        M = self.plan.model_batch
        x_T = initial_noise(self.plan.seed, range(M), self._shape).to(self.device)
        self._first_step(x_T, torch.tensor(self.plan.labels(range(M)), device=self.device), None)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def _first_step(self, x_T: Tensor, y: Tensor, _: Tensor | None) -> Tensor:
        """What the loop is made of: it compiles the model's kernels; the solver's are PyTorch's own."""
        return self._loop.denoiser(x_T, self._loop.timesteps[0], self._loop.denoiser.labels(y))

    def samples(self, indices: range) -> NDArray[Any]:
        """The samples of consecutive indices, finished: (N, ...)."""
        M = self.plan.model_batch
        pieces = []
        for number in range(indices.start // M, -(-indices.stop // M)):
            start = number * M
            pieces.append(self.batch(number)[max(indices.start, start) - start : min(indices.stop, start + M) - start])
        return np.concatenate(pieces)
