"""Training losses: DiT's hybrid of noise prediction and learned variance, and flow matching.

Nothing here asks the device for a value or draws a number that the caller could not have given, so a training step
that passes ``t`` and ``noise`` repeats exactly and can be captured in a CUDA graph.

Shapes: B batch, C channels of the data, ``...`` height and width. A model gives 2C channels: noise (or velocity), then
covariance. Timesteps reach it as float32, 0 to 1000, in training as in sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from dig.diffusion.schedule import Schedule, at, linear_schedule

LossName = Literal["hybrid", "flow-matching"]
ModelFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, C, ...), timesteps (B,) float32, y (B,) int64) to (B, 2C, ...)."""

VLB_WEIGHT = 1e-3
"""λ of improved DDPM's hybrid loss (arXiv 2102.09672 Eq. 16)."""
BIN_HALF_WIDTH = 1 / 255
"""Half the distance of two neighbouring values of an 8-bit image scaled to [-1, 1]."""

FLOW_TIME_SCALE = 1000.0
"""In flow matching the model is told this times the path's t, in training and in sampling."""


class Loss(Protocol):
    """What a trainer needs of a loss.

    Attributes:
        terms: Names of what a call gives, ``loss`` first.
    """

    terms: tuple[str, ...]

    def times(self, uniform: Tensor) -> Tensor:
        """Map uniform numbers in [0, 1), (B,) fp64, to t as `draw` gives it, on the CPU or anywhere."""

    def draw(self, x0: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw what the loss of ``x0`` (B, C, ...) is random in: t (B,) and the noise (B, C, ...).

        The generator lives on x0's device; None is that device's default one.
        """

    def __call__(
        self,
        model_fn: ModelFn,
        x0: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of each sample: (B,) fp32 tensors by name; ``loss`` is the one to average and descend.

        Args:
            model_fn: The model, called once.
            x0: (B, C, ...) data, about in [-1, 1].
            y: (B,) int64 labels, handed to the model as they are.
            generator: What t and noise are drawn from where they are not given.
            t: (B,) as `draw` gives it. Give both t and noise, or neither.
            noise: (B, C, ...) standard normal.
        """


class HybridLoss:
    """ε-prediction with a learned range of variances: what improved DDPM, DiT and DiG train with.

    ::

        loss = mse + λ T vb                                       (arXiv 2102.09672 Eq. 16; λ = 0.001)
        mse  = mean over C, ... of (ε - ε_θ(x_t, t))²             (arXiv 2006.11239 Eq. 14)
        vb   = mean over C, ... of L_t / ln 2, in bits per dimension, where
               L_t = KL(q(x_{t-1} | x_t, x_0) || p_θ(x_{t-1} | x_t))   for t > 0
               L_0 = -log p_θ(x_0 | x_1), discretised to 256 values    (arXiv 2006.11239 Eq. 13)

    ``vb`` is the one term that t names; the bound is T times its mean over uniform t, which is where the factor T in
    λT comes from. At T = 1000 λT is 1: DiT's default (mse + vb, unscaled) and improved DDPM's rescaled loss (vb T/1000)
    agree there, and this class is the latter at any other T. p_θ's mean is detached: ``vb`` teaches the covariance
    channels alone. Latents are not 8-bit images, but DiT takes the same L_0 for them, and so does this.
    """

    terms: tuple[str, ...] = ("loss", "mse", "vb")

    def __init__(self, schedule: Schedule) -> None:
        """Take a `Schedule`, already on the device of the data (`Schedule.to`)."""
        self.schedule = schedule
        self.vlb_factor = VLB_WEIGHT * len(schedule)

    def times(self, uniform: Tensor) -> Tensor:
        """Steps (B,) int64, each as likely as any other."""
        return (uniform * len(self.schedule)).long()

    def draw(self, x0: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Uniform steps t (B,) int64 and standard normal noise like x0, fp32."""
        t = torch.randint(len(self.schedule), (len(x0),), generator=generator, device=x0.device)
        return t, torch.randn(x0.shape, generator=generator, device=x0.device)

    def __call__(
        self,
        model_fn: ModelFn,
        x0: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See `Loss`; gives ``loss``, ``mse`` and ``vb`` (bits per dimension), each (B,). t is int64, 0 to T-1."""
        t, noise = _given_or_drawn(self, x0, t, noise, generator)
        x_t = self.schedule.q_sample(x0, t, noise)
        predicted, covariance = _split(model_fn(x_t, self.schedule.timesteps[t].float(), y), x0)
        mse = _mean((noise - predicted) ** 2)
        vb = self.variational_bound(x0, x_t, t, predicted.detach(), covariance)
        return {"loss": mse + self.vlb_factor * vb, "mse": mse, "vb": vb}

    def variational_bound(self, x0: Tensor, x_t: Tensor, t: Tensor, predicted: Tensor, covariance: Tensor) -> Tensor:
        """The term of the variational bound that t names, (B,) bits per dimension.

        Args:
            x0: (B, C, ...) data.
            x_t: (B, C, ...) its noised form.
            t: (B,) int64 steps.
            predicted: (B, C, ...) predicted noise.
            covariance: (B, C, ...) covariance channels.
        """
        schedule = self.schedule
        mean = schedule.posterior_mean(schedule.predict_x0(x_t, t, predicted), x_t, t)
        log_variance = schedule.log_variance(covariance, t)
        divergence = gaussian_kl(
            schedule.posterior_mean(x0, x_t, t),
            at(schedule.posterior_log_variance_clipped, t, x0.ndim),
            mean,
            log_variance,
        )
        likelihood = discretized_gaussian_log_likelihood(x0, mean, log_variance)
        return torch.where(t == 0, -_mean(likelihood), _mean(divergence)) / math.log(2)


class FlowMatchingLoss:
    """Rectified flow (arXiv 2209.03003 Eq. 1): the velocity of the straight path between data and noise.

    ``x_t = (1 - t) x_0 + t ε`` with t uniform in [0, 1] and the target ``ε - x_0``. (The paper counts t backwards.)
    The model is told 1000 t, so that its timestep embedding sees the range that it was made for. Of its 2C channels the
    first C are the velocity; the covariance is not used, gets no gradient, and stays for one shape of model.
    """

    terms: tuple[str, ...] = ("loss", "mse")

    def times(self, uniform: Tensor) -> Tensor:
        """The numbers themselves, in fp32; those that round up to 1 there are pure noise, which the path allows."""
        return uniform.float()

    def draw(self, x0: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Uniform times t (B,) in [0, 1) and standard normal noise like x0, both fp32."""
        t = torch.rand(len(x0), generator=generator, device=x0.device)
        return t, torch.randn(x0.shape, generator=generator, device=x0.device)

    def __call__(
        self,
        model_fn: ModelFn,
        x0: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See `Loss`; gives ``loss`` and ``mse``, the same (B,) values. t is float, 0 (data) to 1 (noise)."""
        t, noise = _given_or_drawn(self, x0, t, noise, generator)
        time = t.reshape(-1, *(1,) * (x0.ndim - 1))
        velocity, _ = _split(model_fn(x0 + time * (noise - x0), FLOW_TIME_SCALE * t.float(), y), x0)
        mse = _mean((noise - x0 - velocity) ** 2)
        return {"loss": mse, "mse": mse}


def build_loss(name: LossName, *, device: torch.device | str, schedule: Schedule | None = None) -> Loss:
    """The loss of that name, with its constants on ``device`` in fp32.

    Args:
        name: ``hybrid`` or ``flow-matching``.
        device: Where the data is.
        schedule: The hybrid loss's; `linear_schedule` if not given. Flow matching has none.
    """
    if name not in get_args(LossName):
        raise ValueError(f"loss must be one of {', '.join(get_args(LossName))}; got {name!r}")
    if name == "hybrid":
        return HybridLoss((schedule or linear_schedule()).to(device))
    if schedule is not None:
        raise ValueError("flow-matching has no noise schedule to set")
    return FlowMatchingLoss()


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) of each element, in nats."""
    spread = torch.exp(log_variance1 - log_variance2) - 1 + log_variance2 - log_variance1
    return 0.5 * (spread + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability, in nats, that N(mean, variance) gives each of x's 8-bit values (arXiv 2006.11239 Eq. 13).

    The real line is cut into 256 bins around the values k/127.5 - 1, the outermost two reaching to infinity, so that
    the probabilities of all values sum to 1. The normal distribution's integral is exact, where DDPM's and DiT's code
    has a tanh approximation of it; the probability is kept above 1e-12, as there.
    """
    scale = torch.exp(-0.5 * log_variance)
    offset = x - mean
    # By symmetry every bin is taken in the lower tail, where differences of the integral don't cancel in fp32.
    distance = offset.abs()
    inside = torch.special.ndtr((BIN_HALF_WIDTH - distance) * scale)
    inside = inside - torch.special.ndtr((-BIN_HALF_WIDTH - distance) * scale)
    lowest = torch.special.ndtr((BIN_HALF_WIDTH + offset) * scale)
    highest = torch.special.ndtr((BIN_HALF_WIDTH - offset) * scale)
    probability = torch.where(x < -1 + BIN_HALF_WIDTH, lowest, inside)
    probability = torch.where(x > 1 - BIN_HALF_WIDTH, highest, probability)
    return torch.log(probability.clamp(min=1e-12))


def _given_or_drawn(
    loss: Loss, x0: Tensor, t: Tensor | None, noise: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return t and the noise that were given, or draw both."""
    if t is None and noise is None:
        return loss.draw(x0, generator)
    if t is None or noise is None:
        raise ValueError("give both t and noise, or neither")
    if generator is not None:
        raise ValueError("t and noise were given: there is nothing left to draw from the generator")
    return t, noise


def _split(output: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Split a model's (B, 2C, ...) output into two of x0's shape, in fp32."""
    if output.shape != (len(x0), 2 * x0.shape[1], *x0.shape[2:]):
        raise ValueError(f"the model must give twice the channels of {tuple(x0.shape)}; got {tuple(output.shape)}")
    first, second = output.float().chunk(2, 1)
    return first, second


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the batch."""
    return x.flatten(1).mean(1)
