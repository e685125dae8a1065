"""The noise schedule of DDPM (arXiv 2006.11239), and its respacing to fewer steps (arXiv 2102.09672 §4).

Notation of the papers, with t counted from 0 as in every code base: β_t the variance added by step t, α_t = 1 - β_t,
ᾱ_t = Π_{s≤t} α_s and ᾱ_{-1} = 1. Data is assumed to be scaled to about [-1, 1]; all variances are in its squared units.

Shapes: B batch, S steps of the schedule, ``...`` the shape of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """Everything that the losses and the samplers read of a noise schedule, one value per step.

    `from_betas` derives it in fp64 on the CPU; `to` makes the copy that a training step indexes, once. Derived in fp32,
    1 - ᾱ_0 would be off by 2e-4 of its value and β̃_1 by 5e-5.

    Attributes:
        timesteps: (S,) The timestep of the trained model that each step stands for, ascending; fed to the model.
        betas: (S,) β_t.
        log_betas: (S,) log β_t, the upper end of the learned range of variances.
        alphas_cumprod: (S,) ᾱ_t.
        alphas_cumprod_previous: (S,) ᾱ_{t-1}, starting with 1.
        sqrt_alphas_cumprod: (S,) sqrt(ᾱ_t), what is left of the signal.
        sqrt_one_minus_alphas_cumprod: (S,) sqrt(1 - ᾱ_t), the standard deviation of the noise.
        posterior_variance: (S,) Variance β̃_t of q(x_{t-1} | x_t, x_0) (DDPM Eq. 7); 0 at t=0.
        posterior_log_variance_clipped: (S,) log β̃_t, the lower end of the learned range; at t=0, where β̃ is 0, the
            value of t=1, as in improved DDPM.
        posterior_mean_x0: (S,) Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM Eq. 7).
        posterior_mean_xt: (S,) Factor of x_t in the same mean.
    """

    timesteps: Tensor
    betas: Tensor
    log_betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_previous: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_xt: Tensor

    @classmethod
    def from_betas(cls, betas: Tensor, timesteps: Tensor | None = None) -> Schedule:
        """Derive the schedule of (S,) ``betas``, in fp64.

        Args:
            betas: β_t, each above 0 and below 1.
            timesteps: (S,) What the model is told at each step; 0 to S-1 if not given.
        """
        betas = betas.to("cpu", torch.float64)
        if betas.ndim != 1 or len(betas) == 0 or bool((betas <= 0).any()) or bool((betas >= 1).any()):
            raise ValueError("betas must be a vector of values above 0 and below 1")
        timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        if timesteps.shape != betas.shape:
            raise ValueError(f"timesteps and betas differ in length: {tuple(timesteps.shape)}, {tuple(betas.shape)}")
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # A schedule of one step has no t=1 to borrow from; its β is the only variance there is.
        first = posterior_variance[1:2] if len(betas) > 1 else betas[:1]
        return cls(
            timesteps=timesteps,
            betas=betas,
            log_betas=betas.log(),
            alphas_cumprod=alphas_cumprod,
            alphas_cumprod_previous=previous,
            sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),
            posterior_variance=posterior_variance,
            posterior_log_variance_clipped=torch.cat([first, posterior_variance[1:]]).log(),
            posterior_mean_x0=betas * previous.sqrt() / (1 - alphas_cumprod),
            posterior_mean_xt=(1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        )

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Schedule:
        """Copy the schedule to a device, in the precision that a training step computes in (timesteps stay whole)."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in moved.items():
            moved[name] = value.to(device, dtype if value.is_floating_point() else value.dtype)
        return Schedule(**moved)

    def respaced(self, steps: int) -> Schedule:
        """The schedule that visits only `evenly_spaced_timesteps`, with the same ᾱ at each (arXiv 2102.09672 Eq. 19).

        Its betas are 1 - ᾱ_{τ_i} / ᾱ_{τ_{i-1}}, and everything else is derived from those anew.
        """
        if steps == len(self):
            return self
        kept = torch.tensor(evenly_spaced_timesteps(len(self), steps))
        alphas_cumprod = self.alphas_cumprod.to("cpu", torch.float64)[kept]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        return Schedule.from_betas(1 - alphas_cumprod / previous, self.timesteps.cpu()[kept])

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε (DDPM Eq. 4).

        Args:
            x0: (B, ...) data.
            t: (B,) int64 steps, 0 to S-1.
            noise: (B, ...) standard normal ε.
        """
        signal = at(self.sqrt_alphas_cumprod, t, x0.ndim)
        return signal * x0 + at(self.sqrt_one_minus_alphas_cumprod, t, x0.ndim) * noise

    def predict_x0(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Solve `q_sample` for x_0: (B, ...) x_t and ε, (B,) t."""
        signal = at(self.sqrt_alphas_cumprod, t, x_t.ndim)
        return (x_t - at(self.sqrt_one_minus_alphas_cumprod, t, x_t.ndim) * noise) / signal

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM Eq. 7): (B, ...) x_0 and x_t, (B,) t."""
        return at(self.posterior_mean_x0, t, x0.ndim) * x0 + at(self.posterior_mean_xt, t, x0.ndim) * x_t

    def log_variance(self, covariance: Tensor, t: Tensor) -> Tensor:
        """Log variance that a model's covariance channels stand for (arXiv 2102.09672 Eq. 15).

        Args:
            covariance: (B, ...) v: -1 is the posterior variance β̃_t, 1 is β_t, between them it is geometric.
            t: (B,) int64 steps.
        """
        share = (covariance + 1) / 2
        upper = at(self.log_betas, t, covariance.ndim)
        return share * upper + (1 - share) * at(self.posterior_log_variance_clipped, t, covariance.ndim)


def at(table: Tensor, t: Tensor, ndim: int) -> Tensor:
    """Look up (S,) ``table`` at (B,) ``t``, shaped (B, 1, ...) to broadcast over ``ndim`` dimensions."""
    return table[t].reshape(-1, *(1,) * (ndim - 1))


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """DDPM's schedule, which DiT and DiG train with: β rises linearly from 1e-4 to 0.02 over 1000 steps (§4)."""
    return Schedule.from_betas(torch.linspace(first, last, steps, dtype=torch.float64))


def evenly_spaced_timesteps(total: int, steps: int) -> list[int]:
    """Timesteps that a respaced schedule keeps: ``steps`` of 0 to ``total`` - 1, ascending, both ends among them.

    The i-th is i (total - 1) / (steps - 1), rounded: 250 of 1000 are 0, 4, 8, 12, ..., 991, 995, 999. This is the
    rule of improved DDPM and ADM (arXiv 2102.09672 §4), hence of DiT. As there, the stride is summed step by step in
    fp64, so that the sum's own rounding decides ties; ``numpy.linspace(...).round()`` differs by one at such a
    timestep for 278 odd step counts of 1000 (every even count agrees).

    One step is an exception: ADM keeps timestep 0, from which no noise turns into data; here it is the last.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be 1 to {total}, the schedule's own; got {steps}")
    if steps == 1:
        return [total - 1]
    stride = (total - 1) / (steps - 1)
    kept, position = [], 0.0
    for _ in range(steps):
        kept.append(round(position))
        position += stride
    return kept
