"""Sampling stops for the reason it gives, and the step does what it says."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from bench.cases.case import Case
from bench.cases.jobs import Budget
from bench.measure.steps import build_step
from bench.measure.timing import _why_stop, sample
from bench.parity.inputs import fill_zeros, make_inputs


def test_stops_on_time() -> None:
    budget = Budget(settle_s=0.0, settle_max_s=0.0, width=0.0, min_samples=2, target_s=0.05, max_samples=1000)
    found = sample(lambda: time.sleep(0.01), device="cpu", budget=budget)
    assert found.stop_reason == "time"
    assert 2 <= len(found.samples_ms) <= 15
    assert min(found.samples_ms) >= 10


def test_stops_on_samples() -> None:
    budget = Budget(settle_s=0.0, settle_max_s=0.0, width=0.0, min_samples=2, target_s=100, max_samples=7)
    found = sample(lambda: time.sleep(0.001), device="cpu", budget=budget)
    assert (len(found.samples_ms), found.stop_reason) == (7, "samples")


def test_the_hosts_time_is_that_of_timed_steps() -> None:
    lengths = itertools.chain([0.1], itertools.repeat(0.001))
    budget = Budget(settle_s=0.0, settle_max_s=0.0, min_samples=1, least_s=0.0, target_s=0.0, max_samples=1)
    found = sample(lambda: time.sleep(next(lengths)), device="cpu", budget=budget)
    assert (found.host_ms,) == found.samples_ms


NARROW, WIDE = [1.0] * 9, [1.0, 2.0, 3.0] * 3


@pytest.mark.parametrize(
    ("samples", "elapsed", "reason"),
    [
        (NARROW, 0.5, "narrow"),
        (NARROW, 0.2, ""),  # A shorter look sees one moment of the clock.
        (NARROW[:6], 0.5, ""),  # Narrow enough, and too few.
        (NARROW[:6], 9.0, ""),
        (WIDE, 0.5, ""),
        (WIDE, 1.0, "time"),
        ([1.0, 1.1] * 4, 0.5, ""),  # By a tenth; the budget asks for a hundredth.
        (WIDE * 3, 0.0, "samples"),
    ],
)
def test_sampling_ends_for_one_reason(samples: list[float], elapsed: float, reason: str) -> None:
    budget = Budget(min_samples=7, least_s=0.3, width=0.01, target_s=0.8, max_samples=27)
    assert _why_stop(samples, elapsed, budget) == reason


def test_a_slow_step_still_gets_its_fewest_samples() -> None:
    budget = Budget(settle_s=0.0, settle_max_s=0.0, min_samples=3, target_s=0.0, max_samples=10)
    assert len(sample(lambda: time.sleep(0.02), device="cpu", budget=budget).samples_ms) >= 3


def test_a_step_longer_than_the_warm_up_is_not_unsteady_for_that() -> None:
    budget = Budget(settle_s=0.01, settle_max_s=0.02, steady=0.5, min_samples=1, least_s=0.0, target_s=0.0)
    found = sample(lambda: time.sleep(0.15), device="cpu", budget=budget)
    assert (found.warmup, found.warmup_steps) == ("steady", 4)


def test_warm_up_ends_at_its_bound_where_steps_do_not_settle() -> None:
    lengths = (0.05 * 1.1**n for n in itertools.count())
    budget = Budget(settle_s=0.0, settle_max_s=0.3, steady=0.01, min_samples=1, least_s=0.0, target_s=0.0)
    found = sample(lambda: time.sleep(next(lengths)), device="cpu", budget=budget)
    assert found.warmup == "bound"
    assert found.warmup_steps < 30


@pytest.mark.parametrize("change", [{"min_samples": 0}, {"min_samples": 9, "max_samples": 3}, {"target_s": -1}])
def test_a_budget_that_times_nothing_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=r"samples|negative"):
        Budget(**change)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("family", ["DiG", "DiT", "Flash-DiT", "DiS"])
def test_training_step_trains_every_parameter(family: str) -> None:
    case = Case(model=f"{family}-S/4", resolution=64, mode="train", dtype="fp32", device="cpu")
    step = build_step(case)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    for _ in range(4):  # Stochastic depth drops a whole branch of DiS now and then, rarely four times.
        assert step.run().isfinite()
    still = [n for n, p in step.model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert still == []


def test_a_training_step_is_the_loss_its_gradient_and_no_more() -> None:
    """The loss reads noise and covariance; each step's gradients are its own."""
    case = Case(model="DiT-S/8", resolution=64, batch=2, mode="train", dtype="fp32", device="cpu")
    step = build_step(case)
    assert step.optimizer is not None
    step.optimizer.param_groups[0]["lr"] = 0.0
    x, noise, t, y = make_inputs(step.model, case.batch)[0]
    torch.manual_seed(1)  # Labels are dropped at random.
    output = step.model(x, t, y)
    predicted, covariance = output[:, :4], output[:, 4:]
    expected = (predicted - noise).square().mean() + covariance.square().mean()
    gradients = torch.autograd.grad(expected, list(step.model.parameters()), allow_unused=True)
    for _ in range(2):
        torch.manual_seed(1)
        torch.testing.assert_close(step.run(), expected.detach())
    for parameter, gradient in zip(step.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("mode", ["train", "forward"])
@pytest.mark.parametrize(("dtype", "output"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_model_runs_in_the_precision_of_its_case(mode: str, dtype: str, output: torch.dtype) -> None:
    step = build_step(Case(model="DiT-S/8", resolution=64, mode=mode, dtype=dtype, device="cpu"))
    seen = []
    step.model.register_forward_hook(lambda model, inputs, result: seen.append(result.dtype))
    step.run()
    assert seen == [output]
    assert {parameter.dtype for parameter in step.model.parameters()} == {torch.float32}


def test_forward_step_keeps_no_graph_and_is_finite() -> None:
    step = build_step(Case(model="DiG-S/8", resolution=64, mode="forward", dtype="bf16", device="cpu"))
    output = step.run()
    assert not output.requires_grad
    assert output.isfinite().all()
    assert not step.model.training


def test_same_inputs_and_weights_every_time() -> None:
    case = Case(model="DiT-S/8", resolution=64, mode="forward", dtype="fp32", device="cpu")
    assert torch.equal(build_step(case).run(), build_step(case).run())


def test_fill_zeros_leaves_the_rest_alone() -> None:
    model = torch.nn.Linear(3, 3)
    torch.nn.init.zeros_(model.bias)
    weight = model.weight.detach().clone()
    fill_zeros(model)
    assert model.bias.abs().max() > 0
    assert torch.equal(model.weight, weight)
