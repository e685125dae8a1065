"""The losses against numerical integration, and against models that know the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from dig.diffusion import FlowMatchingLoss, HybridLoss, build_loss, linear_schedule
from dig.diffusion.losses import discretized_gaussian_log_likelihood, gaussian_kl

SCHEDULE = linear_schedule().to("cpu")
VALUES = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def knows_the_noise(noise: Tensor, covariance: float):
    """A model that predicts the very noise that was added, with constant covariance channels."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([noise, torch.full_like(noise, covariance)], 1)

    return model


@pytest.mark.parametrize(
    ("mean1", "variance1", "mean2", "variance2"), [(0.0, 1.0, 0.0, 1.0), (0.3, 0.01, 0.29, 0.02), (-1.0, 2.0, 1.5, 0.5)]
)
def test_kl_is_its_integral(mean1: float, variance1: float, mean2: float, variance2: float) -> None:
    first, second = stats.norm(mean1, math.sqrt(variance1)), stats.norm(mean2, math.sqrt(variance2))
    reach = 12 * math.sqrt(variance1)
    expected, _ = integrate.quad(
        lambda x: first.pdf(x) * (first.logpdf(x) - second.logpdf(x)), mean1 - reach, mean1 + reach, epsabs=1e-11
    )
    arguments = torch.tensor([mean1, math.log(variance1), mean2, math.log(variance2)], dtype=torch.float64)
    assert gaussian_kl(*arguments).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 0.01), (0.99, 0.1), (-1.3, 0.3), (0.4, 2.0)])
def test_discretized_likelihood_sums_to_one(mean: float, deviation: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        arguments = torch.tensor([mean, 2 * math.log(deviation)], dtype=dtype)
        log_likelihood = discretized_gaussian_log_likelihood(VALUES.to(dtype), *arguments)
        assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("value", [0, 1, 100, 127, 254, 255])
def test_discretized_likelihood_is_its_integral(value: int) -> None:
    mean, deviation = -0.15, 0.4
    x = VALUES[value].item()
    lower = -np.inf if value == 0 else x - 1 / 255
    upper = np.inf if value == 255 else x + 1 / 255
    expected, _ = integrate.quad(stats.norm(mean, deviation).pdf, lower, upper, epsabs=1e-13)
    arguments = torch.tensor([x, mean, 2 * math.log(deviation)], dtype=torch.float64)
    assert discretized_gaussian_log_likelihood(*arguments).exp().item() == pytest.approx(expected, rel=1e-6)


def test_unlikely_values_cost_a_finite_amount_with_a_finite_gradient() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0])
    mean = torch.tensor([1e3, 1e3, -1e3], requires_grad=True)
    log_variance = torch.full((3,), -9.0, requires_grad=True)
    log_likelihood = discretized_gaussian_log_likelihood(x, mean, log_variance)
    assert torch.allclose(log_likelihood, torch.tensor(math.log(1e-12)))
    log_likelihood.sum().backward()
    assert mean.grad is not None
    assert torch.isfinite(mean.grad).all()


def test_perfect_denoiser_has_no_loss() -> None:
    t = torch.arange(1000)
    x0, noise = torch.randn(2, 1000, 1, 2, 2)
    losses = HybridLoss(SCHEDULE)(knows_the_noise(noise, -1.0), x0, t, t=t, noise=noise)
    assert torch.equal(losses["mse"], torch.zeros(1000))
    # In fp32 the two ways to the posterior mean differ by rounding: 1e-6 of x_0 over a deviation of 0.007 at t=1.
    assert losses["vb"][1:].abs().max() < 1e-6
    assert losses["vb"][0] > 0  # The decoder's term is a likelihood: the right mean doesn't make it 0.


def test_the_model_is_told_the_trained_timestep() -> None:
    told: list[Tensor] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told.append(t)
        return torch.cat([x, x], 1)

    x0, noise, t = *torch.randn(2, 3, 1, 2, 2), torch.tensor([0, 2, 3])
    for schedule in (SCHEDULE, linear_schedule().respaced(4).to("cpu")):
        HybridLoss(schedule)(model, x0, torch.zeros(3).long(), t=t, noise=noise)
    assert [time.tolist() for time in told] == [[0, 2, 3], [0, 666, 999]]
    assert told[0].dtype == torch.float32


def test_vb_is_the_divergence_of_the_two_posteriors() -> None:
    """Wrong noise and v = 0 at t: the KL of two 1-D normals whose moments are derived here from scratch."""
    t, x0, noise, predicted = 40, 0.5, 0.8, 0.2
    schedule = linear_schedule()
    signal, previous = schedule.alphas_cumprod[t].item(), schedule.alphas_cumprod[t - 1].item()
    beta = 1 - signal / previous
    x_t = math.sqrt(signal) * x0 + math.sqrt(1 - signal) * noise
    guess = (x_t - math.sqrt(1 - signal) * predicted) / math.sqrt(signal)
    variance = beta * (1 - previous) / (1 - signal)
    model_variance = math.sqrt(variance * beta)
    shift = math.sqrt(previous) * beta / (1 - signal) * (x0 - guess)
    nats = 0.5 * (math.log(model_variance / variance) + (variance + shift**2) / model_variance - 1)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x, predicted), torch.zeros_like(x)], 1)

    losses = HybridLoss(SCHEDULE)(
        model, torch.full((1, 1, 1), x0), torch.tensor([0]), t=torch.tensor([t]), noise=torch.full((1, 1, 1), noise)
    )
    assert losses["vb"].item() == pytest.approx(nats / math.log(2), rel=1e-4)
    assert losses["mse"].item() == pytest.approx((noise - predicted) ** 2, rel=1e-6)


def test_vb_of_the_first_step_is_the_likelihood_of_the_data() -> None:
    x0 = VALUES[200].float().reshape(1, 1, 1)
    noise = torch.full((1, 1, 1), 0.3)
    losses = HybridLoss(SCHEDULE)(knows_the_noise(noise, 1.0), x0, torch.tensor([0]), t=torch.tensor([0]), noise=noise)
    # The mean is x_0 and the variance β_0 = 1e-4.
    probability = 2 * stats.norm.cdf((1 / 255) / 0.01) - 1
    assert losses["vb"].item() == pytest.approx(-math.log2(probability), rel=1e-3)


@pytest.mark.parametrize("t", [0, 1, 500])
def test_the_mean_is_detached_from_the_bound(t: int) -> None:
    x0, noise = torch.randn(2, 4, 3, 2, 2)
    output = torch.randn(4, 6, 2, 2, requires_grad=True)
    losses = HybridLoss(SCHEDULE)(lambda x, t, y: output, x0, torch.zeros(4).long(), t=torch.full((4,), t), noise=noise)
    (of_vb,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    assert torch.equal(of_vb[:, :3], torch.zeros(4, 3, 2, 2))
    assert (of_vb[:, 3:] != 0).any()
    (of_mse,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert (of_mse[:, :3] != 0).all()
    assert torch.equal(of_mse[:, 3:], torch.zeros(4, 3, 2, 2))


@pytest.mark.parametrize("steps", [1000, 100])
def test_the_bound_is_weighted_by_the_number_of_steps(steps: int) -> None:
    loss = HybridLoss(linear_schedule(steps, last=0.2).to("cpu"))
    x0 = torch.randn(8, 3, 2, 2)
    losses = loss(lambda x, t, y: torch.cat([x, x], 1), x0, torch.zeros(8).long())
    assert torch.allclose(losses["loss"], losses["mse"] + steps / 1000 * losses["vb"])


@pytest.mark.parametrize("name", ["hybrid", "flow-matching"])
def test_given_draws_are_the_generator_s(name: str) -> None:
    loss = build_loss(name, device="cpu")
    x0, y = torch.randn(8, 3, 2, 2), torch.zeros(8).long()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x * t.reshape(-1, 1, 1, 1) / 1000, x.sin()], 1)

    drawn = loss(model, x0, y, generator=torch.Generator().manual_seed(3))
    t, noise = loss.draw(x0, torch.Generator().manual_seed(3))
    given = loss(model, x0, y, t=t, noise=noise)
    assert drawn.keys() == given.keys()
    assert all(torch.equal(drawn[key], given[key]) for key in drawn)
    with pytest.raises(ValueError, match="both t and noise"):
        loss(model, x0, y, t=t)
    with pytest.raises(ValueError, match="nothing left to draw"):
        loss(model, x0, y, t=t, noise=noise, generator=torch.Generator())


@pytest.mark.parametrize("name", ["hybrid", "flow-matching"])
def test_no_value_is_read_back(name: str) -> None:
    """On the meta device there are no values: reading one raises, as it would break a CUDA graph's capture."""
    loss = build_loss(name, device="meta")
    x0 = torch.randn(8, 3, 2, 2, device="meta", requires_grad=True)
    t, noise = loss.draw(x0)
    losses = loss(lambda x, t, y: torch.cat([x, x], 1), x0, torch.zeros(8, device="meta").long(), t=t, noise=noise)
    losses["loss"].mean().backward()
    assert losses["loss"].device.type == "meta"


def test_flow_matching_regresses_the_velocity_of_the_straight_path() -> None:
    x0, noise = torch.randn(2, 4, 3, 2, 2)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    seen: list[tuple[Tensor, Tensor]] = []
    rest = torch.randn(4, 3, 2, 2, requires_grad=True)

    def model(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        seen.append((x, time))
        return torch.cat([noise - x0 + rest * 0, rest], 1)

    losses = FlowMatchingLoss()(model, x0, torch.zeros(4).long(), t=t, noise=noise)
    assert torch.equal(losses["loss"], torch.zeros(4))
    (x_t, time), weight = seen[0], t.reshape(4, 1, 1, 1)
    assert torch.allclose(x_t, (1 - weight) * x0 + weight * noise, atol=1e-6)
    assert time.tolist() == [0, 250, 500, 1000]
    losses["loss"].sum().backward()
    assert rest.grad is not None
    assert torch.equal(rest.grad, torch.zeros_like(rest))


def test_models_without_covariance_are_refused() -> None:
    with pytest.raises(ValueError, match="twice the channels"):
        HybridLoss(SCHEDULE)(lambda x, t, y: x, torch.randn(2, 3, 2, 2), torch.zeros(2).long())


def test_unknown_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="hybrid, flow-matching"):
        build_loss("huber", device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no noise schedule"):
        build_loss("flow-matching", device="cpu", schedule=linear_schedule())
