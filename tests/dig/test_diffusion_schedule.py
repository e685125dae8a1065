"""The schedule against its definitions, and its posterior against a numerical product of Gaussians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dig.diffusion import Schedule, evenly_spaced_timesteps, linear_schedule

SCHEDULE = linear_schedule()


def test_betas_are_ddpm_s() -> None:
    assert len(SCHEDULE) == 1000
    assert SCHEDULE.betas.dtype == torch.float64
    assert SCHEDULE.betas[0].item() == pytest.approx(1e-4, rel=1e-12)
    assert SCHEDULE.betas[-1].item() == pytest.approx(0.02, rel=1e-12)
    assert torch.allclose(SCHEDULE.betas.diff(), torch.full((999,), 0.0199 / 999, dtype=torch.float64), rtol=1e-9)
    assert torch.equal(SCHEDULE.timesteps, torch.arange(1000))


def test_alphas_cumprod_is_the_product() -> None:
    product = 1.0
    for t, beta in enumerate(SCHEDULE.betas.tolist()):
        assert SCHEDULE.alphas_cumprod_previous[t].item() == pytest.approx(product, rel=1e-12)
        product *= 1 - beta
        assert SCHEDULE.alphas_cumprod[t].item() == pytest.approx(product, rel=1e-12)
    ones = SCHEDULE.sqrt_alphas_cumprod**2 + SCHEDULE.sqrt_one_minus_alphas_cumprod**2
    assert torch.allclose(ones, torch.ones_like(ones), rtol=0, atol=1e-15)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_is_bayes_rule(t: int) -> None:
    x0, x_t = 0.7, -0.4
    beta = SCHEDULE.betas[t].item()
    signal = SCHEDULE.alphas_cumprod[t - 1].item()
    grid = np.linspace(-8, 8, 400_001)
    log_density = -((x_t - math.sqrt(1 - beta) * grid) ** 2) / (2 * beta)
    log_density -= (grid - math.sqrt(signal) * x0) ** 2 / (2 * (1 - signal))
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = float((density * grid).sum())
    variance = float((density * (grid - mean) ** 2).sum())

    ours = SCHEDULE.posterior_mean(
        torch.tensor([x0], dtype=torch.float64), torch.tensor([x_t], dtype=torch.float64), torch.tensor([t])
    )
    assert ours.item() == pytest.approx(mean, rel=1e-8)
    assert SCHEDULE.posterior_variance[t].item() == pytest.approx(variance, rel=1e-8)
    assert SCHEDULE.posterior_log_variance_clipped[t].item() == pytest.approx(math.log(variance), rel=1e-8)


def test_posterior_at_the_first_step_is_the_data() -> None:
    assert SCHEDULE.posterior_variance[0] == 0
    assert SCHEDULE.posterior_mean_x0[0].item() == pytest.approx(1, rel=1e-12)
    assert SCHEDULE.posterior_mean_xt[0] == 0
    assert SCHEDULE.posterior_log_variance_clipped[0] == SCHEDULE.posterior_variance[1].log()


def test_noised_data_has_the_variance_of_the_steps_one_by_one() -> None:
    signal, variance = 1.0, 0.0
    for beta in SCHEDULE.betas[:301].tolist():
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
    t, one, zero = torch.tensor([300]), torch.ones(1, 1), torch.zeros(1, 1)
    assert SCHEDULE.q_sample(one, t, zero).item() == pytest.approx(signal, rel=1e-10)
    assert SCHEDULE.q_sample(zero, t, one).item() == pytest.approx(math.sqrt(variance), rel=1e-10)


def test_predict_x0_inverts_q_sample() -> None:
    x0, noise = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 999])
    assert torch.allclose(SCHEDULE.predict_x0(SCHEDULE.q_sample(x0, t, noise), t, noise), x0, atol=1e-12)


def test_learned_range_ends_at_the_fixed_variances() -> None:
    t = torch.arange(1000)
    lower = SCHEDULE.log_variance(torch.full((1000, 1), -1.0, dtype=torch.float64), t).squeeze(1)
    upper = SCHEDULE.log_variance(torch.full((1000, 1), 1.0, dtype=torch.float64), t).squeeze(1)
    assert torch.allclose(lower[1:].exp(), SCHEDULE.posterior_variance[1:], rtol=1e-12)
    assert torch.allclose(upper.exp(), SCHEDULE.betas, rtol=1e-12)
    middle = SCHEDULE.log_variance(torch.zeros(1000, 1, dtype=torch.float64), t).squeeze(1)
    assert torch.allclose(middle[1:].exp(), (SCHEDULE.betas * SCHEDULE.posterior_variance)[1:].sqrt(), rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 250, 999, 1000])
def test_respaced_schedule_has_the_same_noise_levels(steps: int) -> None:
    respaced = SCHEDULE.respaced(steps)
    assert len(respaced) == steps
    assert torch.allclose(respaced.alphas_cumprod, SCHEDULE.alphas_cumprod[respaced.timesteps], rtol=1e-12)
    product = torch.cumprod(1 - respaced.betas, 0)
    assert torch.allclose(product, SCHEDULE.alphas_cumprod[respaced.timesteps], rtol=1e-12)


def test_evenly_spaced_timesteps() -> None:
    assert evenly_spaced_timesteps(1000, 4) == [0, 333, 666, 999]
    assert evenly_spaced_timesteps(1000, 1000) == list(range(1000))
    quarter = evenly_spaced_timesteps(1000, 250)
    assert quarter[:4] == [0, 4, 8, 12]
    assert quarter[-3:] == [991, 995, 999]
    for steps in range(2, 1001):
        kept = evenly_spaced_timesteps(1000, steps)
        assert (kept[0], kept[-1], len(set(kept))) == (0, 999, steps)
        even = np.linspace(0, 999, steps)
        assert np.abs(kept - even).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="steps must be 1 to 1000"):
        SCHEDULE.respaced(steps)


def test_to_keeps_timesteps_whole() -> None:
    moved = SCHEDULE.to("cpu")
    assert isinstance(moved, Schedule)
    assert moved.betas.dtype == torch.float32
    assert moved.timesteps.dtype == torch.int64


def test_betas_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        Schedule.from_betas(torch.tensor([0.1, 1.0]))
