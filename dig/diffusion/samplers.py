"""Sampling: a guided model, the loop over a sampler's steps, and images by class, seed and number.

Shapes: N samples, B batch, C channels, S steps, ``...`` height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dig.diffusion.noise import initial_noise, step_noise
from dig.diffusion.schedule import Schedule
from dig.diffusion.solvers import SamplerName, Solver, build_solver
from dig.layers import Backbone, CfgChannels


class NotFiniteError(FloatingPointError, ValueError):
    """What a model sampled holds NaN or infinity; the message says from which step on, and in which samples."""


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A model with classifier-free guidance, in the precision that it samples in.

    Attributes:
        model: In eval mode.
        cfg_scale: Guidance; at 1 there is none, and the model runs once per sample instead of twice.
        cfg_channels: Which noise channels are guided, as in `Backbone.forward_with_cfg`.
        dtype: Precision of autocast over the model's fp32 weights, ``torch.bfloat16`` say; None for none. A model that
            was cast to bf16 gets its inputs in that, without autocast.

    Raises:
        ValueError: The scale of guidance is not finite.
    """

    model: Backbone
    cfg_scale: float = 1.0
    cfg_channels: CfgChannels = "three"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Refuse what no sample can come of."""
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"the scale of guidance must be a finite number; got {self.cfg_scale}")

    @property
    def guided(self) -> bool:
        """Whether the model runs with and without the class."""
        return self.cfg_scale != 1

    def labels(self, y: Tensor) -> Tensor:
        """The labels (B,) or, with guidance, those and as many of the model's null label (2B,)."""
        return torch.cat([y, torch.full_like(y, self.model.null_label)]) if self.guided else y

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Guided noise (or velocity) and the covariance under the class.

        Args:
            x: (B, C, ...) fp32.
            t: () timestep, the same for all.
            labels: What `labels` gave.

        Returns:
            (B, 2C, ...) fp32.
        """
        t = t.repeat(len(labels))
        x = x.to(next((p.dtype for p in self.model.parameters()), x.dtype))
        with self.autocast(x.device):
            if not self.guided:
                output: Tensor = self.model(x, t, labels)
            else:
                both = self.model.forward_with_cfg(torch.cat([x, x]), t, labels, self.cfg_scale, self.cfg_channels)
                output = both[: len(x)]
        return output.float()

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context that the model runs in."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, dtype=self.dtype)


class SamplingLoop:
    """All steps of a sampler, as one function of tensors that a CUDA graph can capture.

    What differs between steps is on the device, or a Python float, before the first of them; the loop neither reads
    a value back nor draws a number. `run` can be captured whole: x_T, y and the noise (as one tensor) are then the
    graph's static inputs, its result the static output.

    Args:
        denoiser: The guided model.
        solver: The sampler's step rule.
        device: Where the model is.
    """

    def __init__(self, denoiser: Denoiser, solver: Solver, *, device: torch.device | str) -> None:
        self.denoiser = denoiser
        self.solver = solver
        self.timesteps = torch.tensor(solver.timesteps, dtype=torch.float32, device=device)

    @torch.no_grad()
    def run(
        self,
        x_T: Tensor,
        y: Tensor,
        noise: Iterable[Tensor] | None = None,
        *,
        observe: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """Sample from the noise given.

        Args:
            x_T: (B, C, ...) standard normal, fp32.
            y: (B,) int64 classes.
            noise: Standard normal (B, C, ...) for each of the first ``solver.noises`` steps: a tensor
                (noises, B, C, ...), or for less memory an iterator that brings them one at a time. None if there are
                none to add.
            observe: Called with the number of each step, 0 being the first, and the (B, C, ...) that it came to.

        Returns:
            (B, C, ...) x_0, fp32, not clipped.
        """
        noises = iter(()) if noise is None else iter(noise)
        labels = self.denoiser.labels(y)
        step = self.solver.start()
        x = x_T
        # One context for all steps: autocast then casts a weight (that requires a gradient) once, not once a step.
        with self.denoiser.autocast(x_T.device):
            for i in range(len(self.solver.timesteps)):
                output = self.denoiser(x, self.timesteps[i], labels)
                x = step(i, x, output, self._next(noises) if i < self.solver.noises else None)
                if observe is not None:
                    observe(i, x)
        return x

    def _next(self, noises: Iterator[Tensor]) -> Tensor:
        noise = next(noises, None)
        if noise is None:
            raise ValueError(f"this sampler adds noise in {self.solver.noises} steps; fewer were given")
        return noise


def check_finite(x: Tensor, indices: Sequence[int], again: Callable[[Callable[[int, Tensor], object]], object]) -> None:
    """Raise `NotFiniteError` if samples are not finite: drawn as pixels they would be black, and look like samples.

    Args:
        x: (B, C, ...) as the loop ended.
        indices: Number of each sample.
        again: Runs the same loop with the observer that it is given. Called only to find the step: looking at each
            one would make every loop wait for the device.
    """
    if bool(torch.isfinite(x).all()):
        return
    wrong: list[int] = []
    first: int | None = None

    def observe(step: int, state: Tensor) -> None:
        nonlocal first, wrong
        if first is None:
            finite = torch.isfinite(state).flatten(1).all(1).tolist()
            wrong = [index for index, fine in zip(indices, finite, strict=True) if not fine]
            first = step if wrong else None

    again(observe)
    named = ", ".join(map(str, wrong[:5])) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    where = f"from step {first + 1} on in sample {named}" if first is not None else "in this execution, and not eagerly"
    raise NotFiniteError(
        f"what was sampled is not finite, {where}, and is not drawn; try less guidance, fp32, or an earlier checkpoint"
    )


def sample(
    model: Backbone,
    y: Tensor,
    *,
    sampler: SamplerName = "ddpm",
    steps: int | None = None,
    eta: float = 0.0,
    cfg_scale: float = 1.0,
    cfg_channels: CfgChannels = "three",
    seed: int = 0,
    first_index: int = 0,
    batch: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    schedule: Schedule | None = None,
    observe: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Sample one x_0 for each label, from noise that is a function of seed and sample index (`dig.diffusion.noise`).

    The same seed and index get the same noise in any batch on any device, hence the same image, up to what the model's
    own arithmetic makes of another batch size.

    Args:
        model: On ``device``; it is put into eval mode for the call, and back.
        y: (N,) int64 classes, below the model's null label; the null label itself samples without a class.
        sampler: ``ddpm``, ``ddim``, ``dpm-solver++``, or ``euler`` for a flow-matching model.
        steps: Steps S; the sampler's own default if not given.
        eta: Share of noise of ``ddim``.
        cfg_scale: Classifier-free guidance; 1 is none.
        cfg_channels: ``three`` (as published) or ``all`` noise channels are guided.
        seed: 0 to 2^64 - 1.
        first_index: Index of the first sample, for a run that goes on where another ended.
        batch: Samples at a time; all if not given.
        device: Where to sample; where the model is, if not given.
        dtype: Precision of autocast over the model's fp32 weights, ``torch.bfloat16`` say; None for none. A model that
            was cast to bf16 gets its inputs in that, without autocast.
        schedule: Noise schedule of training; DDPM's linear one if not given.
        observe: As in `SamplingLoop.run`; what it raises ends the sampling.

    Returns:
        (N, C, height, width) fp32 on ``device``, in the data's scale, not clipped.

    Raises:
        NotFiniteError: What was sampled is not finite.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    if y.ndim != 1 or (len(y) and not 0 <= int(y.min()) <= int(y.max()) <= model.null_label):
        raise ValueError(f"y must be a vector of labels, 0 to {model.null_label} (the null label)")
    parameter = next(model.parameters(), None)
    device = torch.device(device) if device is not None else parameter.device if parameter is not None else y.device
    solver = build_solver(sampler, steps=steps, eta=eta, schedule=schedule)
    denoiser = Denoiser(model=model, cfg_scale=cfg_scale, cfg_channels=cfg_channels, dtype=dtype)
    loop = SamplingLoop(denoiser, solver, device=device)
    shape = (model.in_channels, *model.input_size)
    samples = torch.empty((len(y), *shape), device=device)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(y), batch or max(len(y), 1)):
            labels = y[start : start + batch] if batch else y
            indices = range(first_index + start, first_index + start + len(labels))
            x_T, labels = initial_noise(seed, indices, shape).to(device), labels.to(device)

            def run(
                observe: Callable[[int, Tensor], object] | None,
                x_T: Tensor = x_T,
                labels: Tensor = labels,
                indices: range = indices,
            ) -> Tensor:
                noises = (step_noise(seed, indices, shape, i).to(device) for i in range(solver.noises))
                return loop.run(x_T, labels, noises, observe=observe)

            x = run(observe)
            check_finite(x, indices, run)
            samples[start : start + len(labels)] = x
    finally:
        model.train(training)
    return samples
