"""The step rules of the samplers: from x at one noise level, and what the model says of it, to x at the next.

All constants are Python floats that are known before the first step, so a loop over the steps never waits for the
device. What of this diffusers (0.42) has, and what is written here instead:

- **dpm-solver++** is diffusers' ``DPMSolverMultistepScheduler``: second order, and its constants stay on the CPU. The
  covariance must be split off before it: its ``variance_type="learned_range"`` keeps ``model_output[:, :3]``, which is
  wrong for latents of four channels.
- **ddpm** is written here: ``DDPMScheduler`` splits and interpolates a learned range rightly, and follows any list of
  timesteps, but draws its noise itself, so that neither a batch split nor a CUDA graph could be given the same one.
- **ddim** is written here: ``DDIMScheduler`` takes T // steps as the distance to the next timestep, whatever the
  timesteps are. With the ones kept here (and its own ``linspace``) the step ends at a noise level other than the one
  that the model is then told. It doesn't split off a covariance either.
- **euler** is written here: one multiplication and addition. ``FlowMatchEulerDiscreteScheduler`` spaces its default
  times between 1 and 1/1000, then adds 0, so that one of its steps goes to waste.

Shapes: B batch, C channels of the data, S steps, ``...`` height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from dig.diffusion.losses import FLOW_TIME_SCALE
from dig.diffusion.schedule import Schedule, linear_schedule
from dig.packages import require

SamplerName = Literal["ddpm", "ddim", "dpm-solver++", "euler"]
Step = Callable[[int, Tensor, Tensor, "Tensor | None"], Tensor]
"""(i, x (B, C, ...), output (B, 2C, ...), noise (B, C, ...) or None), all fp32, to the next x: the i-th step."""
DEFAULT_STEPS: dict[SamplerName, int] = {"ddpm": 250, "ddim": 50, "dpm-solver++": 20, "euler": 50}

MAX_EULER_STEPS = 10_000
"""More than a flow's straight path could ever want, and few enough to write down."""


class Solver(Protocol):
    """A sampler's step rule.

    Attributes:
        timesteps: What the model is told at each of the S steps, in the order of sampling.
        noises: How many steps add noise, counted from the first.
    """

    timesteps: list[float]
    noises: int

    def start(self) -> Step:
        """Begin a run: its steps are to be called in order, 0 to S-1. Runs don't share state."""


class DDPMSolver:
    """Ancestral sampling with learned variance (arXiv 2006.11239 Alg. 2; 2102.09672 Eq. 15) on a respaced schedule.

    The last step adds no noise. x_0 is not clipped, as in DiT's sampling.
    """

    def __init__(self, schedule: Schedule, steps: int) -> None:
        respaced = schedule.respaced(steps).to("cpu", torch.float64)
        mean_x0, mean_xt = respaced.posterior_mean_x0, respaced.posterior_mean_xt
        # The posterior mean at the predicted x_0, with x_0 written out: one factor for x_t, one for ε.
        self._x = _descending(mean_xt + mean_x0 / respaced.sqrt_alphas_cumprod)
        noise_factor = -mean_x0 * respaced.sqrt_one_minus_alphas_cumprod / respaced.sqrt_alphas_cumprod
        self._epsilon = _descending(noise_factor)
        self._log_lower = _descending(respaced.posterior_log_variance_clipped)
        self._log_upper = _descending(respaced.log_betas)
        self.timesteps = _descending(respaced.timesteps.double())
        self.noises = steps - 1

    def start(self) -> Step:
        """See `Solver`."""
        return self._step

    def _step(self, i: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
        epsilon, covariance = output.chunk(2, 1)
        mean = self._x[i] * x + self._epsilon[i] * epsilon
        if i == self.noises:
            return mean
        assert noise is not None
        middle = (self._log_upper[i] + self._log_lower[i]) / 2
        half_range = (self._log_upper[i] - self._log_lower[i]) / 2
        return mean + torch.exp((middle + half_range * covariance) / 2) * noise


class DDIMSolver:
    """DDIM (arXiv 2010.02502 Eq. 12 and 16) on a respaced schedule; the covariance channels are not used.

    Args:
        schedule: Noise schedule of training.
        steps: Steps S.
        eta: 0 is the deterministic sampler, 1 has DDPM's fixed posterior variance.
    """

    def __init__(self, schedule: Schedule, steps: int, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be 0 to 1; got {eta}")
        respaced = schedule.respaced(steps).to("cpu", torch.float64)
        current, following = respaced.alphas_cumprod, respaced.alphas_cumprod_previous
        variance = eta**2 * respaced.posterior_variance
        self._x = _descending((following / current).sqrt())
        # sqrt(ᾱ') x_0 with x_0 written out as in DDPM's, and the direction that points back to x_t.
        direction = (1 - following - variance).clamp(min=0).sqrt()
        self._epsilon = _descending(direction - (following * (1 - current) / current).sqrt())
        self._deviation = _descending(variance.sqrt())
        self.timesteps = _descending(respaced.timesteps.double())
        self.noises = steps - 1 if eta > 0 else 0

    def start(self) -> Step:
        """See `Solver`."""
        return self._step

    def _step(self, i: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
        x = self._x[i] * x + self._epsilon[i] * output.chunk(2, 1)[0]
        if i >= self.noises:
            return x
        assert noise is not None
        return x + self._deviation[i] * noise


class DPMSolver:
    """DPM-Solver++(2M) (arXiv 2211.01095 Alg. 2), by diffusers; the covariance channels are not used.

    Its S timesteps are S+1 evenly spaced ones without the lowest, 0. The first step is of first order for want of a
    past, the last because it ends at no noise at all, where half the log signal-to-noise ratio is infinite. The steps
    that `DDIMSolver` takes would suit it badly: their last jump, from 0.01 noise, leaves a far longer one before it.
    """

    def __init__(self, schedule: Schedule, steps: int) -> None:
        if not 1 <= steps < len(schedule):
            raise ValueError(f"dpm-solver++ takes 1 to {len(schedule) - 1} steps of this schedule; got {steps}")
        if not torch.equal(schedule.timesteps.cpu(), torch.arange(len(schedule))):
            raise ValueError("dpm-solver++ spaces its own steps: give it the schedule of training, not a respaced one")
        # Imported where it is needed: it takes seconds.
        diffusers = require("diffusers", "sampler dpm-solver++")

        self.steps = steps
        self.noises = 0
        self._scheduler = diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=len(schedule),
            trained_betas=schedule.betas.tolist(),
            solver_order=2,
            prediction_type="epsilon",
            algorithm_type="dpmsolver++",
            timestep_spacing="linspace",
        )
        self._scheduler.set_timesteps(steps, device="cpu")
        self.timesteps = [float(t) for t in self._scheduler.timesteps.tolist()]

    def start(self) -> Step:
        """See `Solver`. The scheduler remembers the last step's output, so each run has one of its own."""
        scheduler = type(self._scheduler).from_config(self._scheduler.config)
        scheduler.set_timesteps(self.steps, device="cpu")

        def step(i: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
            following: Tensor = scheduler.step(output.chunk(2, 1)[0], self.timesteps[i], x, return_dict=False)[0]
            return following

        return step


class EulerSolver:
    """Euler's steps down the flow's ordinary differential equation, t from 1 (noise) to 0 (arXiv 2209.03003 §2.2)."""

    def __init__(self, steps: int) -> None:
        if not 1 <= steps <= MAX_EULER_STEPS:
            raise ValueError(f"euler takes 1 to {MAX_EULER_STEPS:,} steps; got {steps}")
        self.timesteps = [FLOW_TIME_SCALE * (steps - i) / steps for i in range(steps)]
        self.noises = 0
        self._interval = 1 / steps

    def start(self) -> Step:
        """See `Solver`."""
        return self._step

    def _step(self, i: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
        return x - self._interval * output.chunk(2, 1)[0]


def build_solver(
    name: SamplerName, *, steps: int | None = None, eta: float = 0.0, schedule: Schedule | None = None
) -> Solver:
    """The sampler of that name.

    Args:
        name: ``ddpm``, ``ddim`` or ``dpm-solver++`` for a model that predicts noise; ``euler`` for flow matching.
        steps: Model evaluations; the sampler's own default (`DEFAULT_STEPS`) if not given.
        eta: Share of noise of ``ddim``; no other sampler takes one.
        schedule: Noise schedule of training; `linear_schedule` if not given. ``euler`` has none.

    Raises:
        ValueError: An unknown name, or an option that this sampler can't have.
        MissingPackageError: ``dpm-solver++`` without diffusers.
    """
    if name not in get_args(SamplerName):
        raise ValueError(f"sampler must be one of {', '.join(get_args(SamplerName))}; got {name!r}")
    if not (math.isfinite(eta) and (name == "ddim" or eta == 0)):
        raise ValueError(f"eta is an option of ddim; got {eta} for {name}")
    steps = DEFAULT_STEPS[name] if steps is None else steps
    if name == "euler":
        if schedule is not None:
            raise ValueError("euler samples flow-matching models, which have no noise schedule")
        return EulerSolver(steps)
    schedule = linear_schedule() if schedule is None else schedule
    if name == "ddpm":
        return DDPMSolver(schedule, steps)
    if name == "ddim":
        return DDIMSolver(schedule, steps, eta)
    return DPMSolver(schedule, steps)


def _descending(table: Tensor) -> list[float]:
    """A schedule's (S,) values in the order of sampling, as Python floats."""
    return [float(value) for value in table.flip(0).tolist()]
