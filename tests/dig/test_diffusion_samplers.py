"""The samplers against models whose answer is known: one that knows the data, one that knows its distribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from dig.diffusion import (
    Denoiser,
    SamplingLoop,
    build_solver,
    initial_noise,
    linear_schedule,
    sample,
    step_noise,
)
from dig.layers import Backbone
from dig.model import DiG, DiGConfig
from dig.packages import MissingPackageError

SCHEDULE = linear_schedule()
ALPHAS_CUMPROD = SCHEDULE.alphas_cumprod.float()
NOISE_SAMPLERS = ("ddpm", "ddim", "dpm-solver++")
Predict = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Known(Backbone):
    """A backbone that calls a function in place of a network, and keeps what it was called with."""

    def __init__(self, predict: Predict, *, in_channels: int = 1, size: int = 1) -> None:
        super().__init__(input_size=(size, size), in_channels=in_channels, patch_size=1, num_classes=3)
        self.predict = predict
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append((x, t, y))
        return torch.cat(self.predict(x, t.reshape(-1, 1, 1, 1), y), 1)


def knows_the_data(x0: Tensor) -> Predict:
    """The noise in x_t, and the true posterior variance."""

    def predict(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        level = ALPHAS_CUMPROD[t.long()]
        return (x - level.sqrt() * x0) / (1 - level).sqrt(), torch.full_like(x, -1.0)

    return predict


def knows_the_data_of_a_flow(x0: Tensor) -> Predict:
    return lambda x, t, y: ((x - x0) * 1000 / t, torch.zeros_like(x))


def knows_the_distribution(deviation: float, covariance: Callable[[int], float] = lambda t: 0.0) -> Predict:
    """E[ε | x_t] where x_0 ~ N(0, deviation²), and covariance channels by timestep."""

    def predict(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        level = ALPHAS_CUMPROD[t.long()]
        noise = (1 - level).sqrt() * x / (level * deviation**2 + 1 - level)
        return noise, torch.full_like(x, covariance(int(t[0])))

    return predict


def run(
    model: Backbone, sampler: str, x_T: Tensor, noise: Iterable[Tensor] | None = None, steps: int = 20, eta: float = 0.0
) -> Tensor:
    loop = SamplingLoop(Denoiser(model=model), build_solver(sampler, steps=steps, eta=eta), device=x_T.device)
    return loop.run(x_T, torch.zeros(len(x_T), device=x_T.device).long(), noise)


def tiny_dig(label_dropout: float = 0.1) -> DiG:
    """A DiG of two blocks whose output is not zero, as an untrained one's is."""
    config = DiGConfig(
        input_size=(4, 4), in_channels=4, num_classes=3, depth=2, width=32, heads=2, label_dropout=label_dropout
    )
    model = DiG(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize(
    ("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm-solver++", 0.0), ("euler", 0.0)]
)
def test_perfect_denoiser_gives_the_data_back(sampler: str, eta: float, steps: int) -> None:
    x0, x_T = torch.randn(2, 5, 3, 4, 4)
    knows = knows_the_data_of_a_flow if sampler == "euler" else knows_the_data
    model = Known(knows(x0), in_channels=3, size=4)
    x = run(model, sampler, x_T, torch.randn(steps, 5, 3, 4, 4), steps, eta)
    # One step from ᾱ = 4e-5 magnifies fp32's rounding of the noise 158 times.
    assert torch.allclose(x, x0, atol=1e-4)
    assert len(model.seen) == steps


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize("steps", [7, 50])
def test_deterministic_samplers_meet_the_model_at_the_level_it_is_told(sampler: str, steps: int) -> None:
    """With perfect predictions x stays on the line from its x_0 to its noise: at each t, exactly x_t."""
    x0, noise = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    model = Known(knows_the_data(x0.float()), size=2)
    run(model, sampler, SCHEDULE.q_sample(x0, torch.full((5,), 999), noise).float(), steps=steps)
    for x, t, _ in model.seen:
        assert torch.allclose(x, SCHEDULE.q_sample(x0, t.long(), noise).float(), atol=2e-4)


@pytest.mark.parametrize("steps", [1, 8])
def test_euler_meets_the_model_at_the_time_it_is_told(steps: int) -> None:
    x0, x_T = torch.randn(2, 5, 1, 2, 2)
    model = Known(knows_the_data_of_a_flow(x0), size=2)
    run(model, "euler", x_T, steps=steps)
    for i, (x, t, _) in enumerate(model.seen):
        time = 1 - i / steps
        assert torch.allclose(t, torch.tensor(1000 * time))
        assert torch.allclose(x, (1 - time) * x0 + time * x_T, atol=1e-5)


def ode_errors(sampler: str, steps: int, deviation: float) -> tuple[float, float]:
    """Relative errors of the standard deviation, before the last step and at the end.

    The probability flow of a centred Gaussian only scales x, from its deviation at one level to that at the next.
    """
    model = Known(knows_the_distribution(deviation))
    end = run(model, sampler, torch.ones(1, 1, 1, 1), steps=steps).item()

    def exact(level: float) -> float:
        return math.sqrt(level * deviation**2 + 1 - level)

    start = exact(SCHEDULE.alphas_cumprod[-1].item())
    x, t, _ = model.seen[-1]
    before = exact(SCHEDULE.alphas_cumprod[t.long()].item()) / start
    return abs(x.item() / before - 1), abs(end / (deviation / start) - 1)


@pytest.mark.parametrize("deviation", [2.0, 3.0])
def test_dpm_solver_is_of_second_order_and_ddim_of_first(deviation: float) -> None:
    """Before the last step, which is of first order: 50, 100 and 200 steps, where rounded timesteps don't yet show."""
    for sampler, lowest, highest in (("dpm-solver++", 1.6, 2.3), ("ddim", 0.8, 1.2)):
        errors = [ode_errors(sampler, steps, deviation)[0] for steps in (50, 100, 200)]
        orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
        assert all(lowest < order < highest for order in orders), (sampler, errors, orders)


@pytest.mark.parametrize("deviation", [0.5, 1.0, 2.0])
def test_deterministic_samplers_converge_to_the_distribution(deviation: float) -> None:
    assert ode_errors("dpm-solver++", 100, deviation)[1] < 1e-3
    assert ode_errors("dpm-solver++", 200, deviation)[1] < 2e-4
    assert ode_errors("ddim", 1000, deviation)[1] < 5e-3


def impulse_variance(model: Backbone, sampler: str, steps: int, eta: float = 0.0) -> float:
    """Exact variance of what a linear sampler makes of standard normal noise: x_T and each step's, one at a time."""
    sources = torch.eye(steps).reshape(steps, steps, 1, 1, 1)
    x = run(model, sampler, sources[0], sources[1:], steps, eta)
    return float((x.double() ** 2).sum())


def optimal_covariance(deviation: float, steps: int) -> Callable[[int], float]:
    """Covariance channels that stand for the true variance of q(x_{t-1} | x_t), where x_0 ~ N(0, deviation²)."""
    respaced = SCHEDULE.respaced(steps)
    spread = deviation**2
    level = respaced.alphas_cumprod
    of_x0 = spread * (1 - level) / (level * spread + 1 - level)
    variance = respaced.posterior_variance + respaced.posterior_mean_x0**2 * of_x0
    lower, upper = respaced.posterior_log_variance_clipped, respaced.log_betas
    covariance = 2 * (variance.log() - lower) / (upper - lower) - 1
    table = dict(zip(respaced.timesteps.tolist(), covariance.tolist(), strict=True))
    return lambda t: table[t]


@pytest.mark.parametrize("steps", [10, 250])
@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_ddpm_with_the_true_variance_is_exact_at_any_number_of_steps(deviation: float, steps: int) -> None:
    model = Known(knows_the_distribution(deviation, optimal_covariance(deviation, steps)))
    # The last step adds no noise, so what x_0 still varies by given x at 0.01 noise (ᾱ = 0.9999) is missing.
    assert impulse_variance(model, "ddpm", steps) == pytest.approx(deviation**2, rel=5e-4)


@pytest.mark.parametrize("covariance", [-1.0, 1.0])
def test_ddpm_converges_with_either_fixed_variance(covariance: float) -> None:
    model = Known(knows_the_distribution(0.5, lambda t: covariance))
    errors = [abs(impulse_variance(model, "ddpm", steps) / 0.25 - 1) for steps in (50, 200, 800)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


def test_ddim_with_full_eta_is_ddpm_with_the_posterior_variance() -> None:
    model = Known(lambda x, t, y: (x.sin() * t / 1000, torch.full_like(x, -1.0)), size=2)
    x_T, noise = torch.randn(3, 1, 2, 2), torch.randn(9, 3, 1, 2, 2)
    ddpm, ddim = run(model, "ddpm", x_T, noise, 10), run(model, "ddim", x_T, noise, 10, eta=1.0)
    assert torch.allclose(ddpm, ddim, rtol=1e-4, atol=1e-4)


def test_ddim_adds_eta_times_the_posterior_deviation() -> None:
    respaced = SCHEDULE.respaced(10)
    step = build_solver("ddim", steps=10, eta=0.5).start()
    x, output = torch.randn(2, 1, 1, 1), torch.randn(2, 2, 1, 1)
    for i in range(9):
        added = step(i, x, output, torch.ones_like(x)) - step(i, x, output, torch.zeros_like(x))
        expected = 0.5 * respaced.posterior_variance[9 - i].sqrt().item()
        assert torch.allclose(added, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", [*NOISE_SAMPLERS, "euler"])
def test_runs_of_one_solver_can_be_interleaved(sampler: str) -> None:
    solver = build_solver(sampler, steps=5)  # type: ignore[arg-type]
    alone, first, second = solver.start(), solver.start(), solver.start()
    x = mixed = torch.randn(2, 1, 1, 1)
    for i in range(5):
        output, noise = torch.randn(2, 2, 1, 1), torch.randn(2, 1, 1, 1)
        x = alone(i, x, output, noise)
        mixed = first(i, mixed, output, noise)
        second(i, torch.randn(2, 1, 1, 1), torch.randn(2, 2, 1, 1), noise)
    assert torch.equal(x, mixed)


def nonlinear(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    shift = 0.1 * y.reshape(-1, 1, 1, 1)
    return torch.tanh(x + shift), (x * t / 500).sin()


@pytest.mark.parametrize(
    ("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("dpm-solver++", 0.0), ("euler", 0.0)]
)
def test_same_seed_same_samples_whatever_the_batch(sampler: str, eta: float) -> None:
    model = Known(nonlinear, in_channels=2, size=3)
    y = torch.tensor([0, 2, 1, 1, 3, 0, 2])

    def draw(**options: object) -> Tensor:
        return sample(model, y, sampler=sampler, steps=6, eta=eta, cfg_scale=1.5, seed=5, **options)  # type: ignore[arg-type]

    whole = draw()
    assert whole.shape == (7, 2, 3, 3)
    for batch in (1, 3, 7, 100):
        # The elementwise kernels treat the last few values of a tensor apart: equal up to fp32's rounding.
        assert torch.allclose(draw(batch=batch), whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(draw(), whole)
    rest = sample(model, y[4:], sampler=sampler, steps=6, eta=eta, cfg_scale=1.5, seed=5, first_index=4)  # type: ignore[arg-type]
    assert torch.allclose(rest, whole[4:], rtol=1e-4, atol=1e-5)
    other = sample(model, y, sampler=sampler, steps=6, eta=eta, cfg_scale=1.5, seed=6)  # type: ignore[arg-type]
    assert not torch.allclose(other, whole, atol=1e-1)


def test_noise_is_a_function_of_seed_index_and_step() -> None:
    whole = initial_noise(3, range(100, 108), (2, 5))
    assert torch.equal(whole[5:], initial_noise(3, range(105, 108), (2, 5)))
    streams = [whole, initial_noise(4, range(100, 108), (2, 5)), initial_noise(3 + 2**32, range(100, 108), (2, 5))]
    streams += [step_noise(3, range(100, 108), (2, 5), step) for step in (0, 1)]
    rows = torch.cat(streams).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    many = initial_noise(0, range(200), (1000,))
    assert many.dtype == torch.float32
    assert abs(many.mean().item()) < 0.01
    assert abs(many.var().item() - 1) < 0.02
    assert abs((many[:-1] * many[1:]).mean().item()) < 0.01


def test_ddim_without_eta_draws_nothing() -> None:
    model = Known(nonlinear, size=2)
    x_T = torch.randn(2, 1, 2, 2)
    assert build_solver("ddim", steps=10).noises == 0
    assert torch.equal(run(model, "ddim", x_T, None), run(model, "ddim", x_T, torch.randn(20, 2, 1, 2, 2)))


def test_too_little_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="adds noise in 9 steps"):
        run(Known(nonlinear), "ddpm", torch.randn(2, 1, 1, 1), torch.randn(8, 2, 1, 1, 1), steps=10)


@pytest.mark.parametrize("cfg_channels", ["three", "all"])
def test_guidance_at_scale_one_is_none(cfg_channels: str) -> None:
    model, y = tiny_dig(), torch.tensor([0, 1, 2])
    unguided = sample(model, y, sampler="ddim", steps=4)
    # Not quite 1, so that the model does run twice.
    guided = sample(model, y, sampler="ddim", steps=4, cfg_scale=1 + 1e-12, cfg_channels=cfg_channels)  # type: ignore[arg-type]
    assert torch.allclose(guided, unguided, rtol=1e-4, atol=1e-4)
    strong = sample(model, y, sampler="ddim", steps=4, cfg_scale=4.0, cfg_channels=cfg_channels)  # type: ignore[arg-type]
    assert not torch.allclose(strong, unguided, rtol=1e-2, atol=1e-2)


def test_guidance_extrapolates_from_the_model_s_null_label() -> None:
    def predict(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value = y.reshape(-1, 1, 1, 1).float().expand_as(x)
        return value, -value

    model = Known(predict, in_channels=4, size=2)
    for channels, last in (("three", 1.0), ("all", 3 + 2.5 * (1 - 3))):
        denoiser = Denoiser(model=model, cfg_scale=2.5, cfg_channels=channels)  # type: ignore[arg-type]
        y = torch.tensor([1, 2])
        assert denoiser.labels(y).tolist() == [1, 2, 3, 3]
        output = denoiser(torch.zeros(2, 4, 2, 2), torch.tensor(5.0), denoiser.labels(y))
        first = output[0, :, 0, 0]
        assert first[:3].tolist() == [3 + 2.5 * (1 - 3)] * 3
        assert first[3].item() == last
        assert first[4:].tolist() == [-1.0] * 4  # The covariance is the class's own.


@pytest.mark.parametrize("sampler", [*NOISE_SAMPLERS, "euler"])
def test_the_loop_reads_no_value_back(sampler: str) -> None:
    """On the meta device there are no values: reading one raises, as it would break a CUDA graph's capture."""
    loop = SamplingLoop(
        Denoiser(model=tiny_dig().to("meta"), cfg_scale=1.5), build_solver(sampler, steps=5), device="meta"
    )
    x_T, noise = torch.randn(2, 4, 4, 4, device="meta"), torch.randn(4, 2, 4, 4, 4, device="meta")
    assert loop.run(x_T, torch.zeros(2, device="meta").long(), noise).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", [*NOISE_SAMPLERS, "euler"])
def test_the_loop_is_captured_in_a_cuda_graph(sampler: str) -> None:
    if sampler == "dpm-solver++":
        pytest.importorskip("diffusers")
    loop = SamplingLoop(Denoiser(model=tiny_dig().cuda(), cfg_scale=1.5), build_solver(sampler, steps=5), device="cuda")
    x_T, noise = torch.randn(2, 4, 4, 4, device="cuda"), torch.randn(4, 2, 4, 4, 4, device="cuda")
    y = torch.tensor([0, 2], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop.run(x_T, y, noise)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loop.run(x_T, y, noise)
    x_T.copy_(torch.randn_like(x_T))
    y.copy_(torch.tensor([1, 0]))
    graph.replay()
    assert torch.allclose(captured, loop.run(x_T, y, noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", [*NOISE_SAMPLERS, "euler"])
def test_autocast_keeps_x_in_fp32(sampler: str) -> None:
    model, y = tiny_dig(), torch.tensor([0, 1])
    output = Denoiser(model=model, dtype=torch.bfloat16)(torch.randn(2, 4, 4, 4), torch.tensor(5.0), y)
    assert output.dtype == torch.float32  # The solver's own arithmetic is not to round to bf16.
    x = sample(model, y, sampler=sampler, steps=3, dtype=torch.bfloat16, cfg_scale=1.5)  # type: ignore[arg-type]
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert not torch.equal(x, x.bfloat16().float())
    exact = sample(model, y, sampler=sampler, steps=3, cfg_scale=1.5)  # type: ignore[arg-type]
    assert not torch.equal(x, exact)
    assert torch.linalg.vector_norm(x - exact) < 0.1 * torch.linalg.vector_norm(exact)


def test_sample_leaves_the_model_in_its_mode() -> None:
    model = tiny_dig(label_dropout=0.5).train()
    first, second = (sample(model, torch.tensor([0, 1, 2] * 4), sampler="ddim", steps=2) for _ in range(2))
    assert torch.equal(first, second)  # No label was dropped.
    assert model.training


def test_dpm_solver_without_diffusers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dig.packages.is_installed", lambda module: False)
    with pytest.raises(MissingPackageError, match=r"dig-diffusion\[train\]"):
        build_solver("dpm-solver++")


def test_nonsense_is_refused() -> None:
    model, y = Known(nonlinear), torch.tensor([0])
    for options, message in (
        ({"sampler": "heun"}, "ddpm, ddim, dpm-solver"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta is an option of ddim"),
        ({"sampler": "ddim", "eta": 1.5}, "eta must be 0 to 1"),
        ({"sampler": "ddpm", "steps": 0}, "steps must be 1 to 1000"),
        ({"sampler": "dpm-solver++", "steps": 1000}, "1 to 999 steps"),
        ({"sampler": "euler", "steps": 0}, "1 to 10,000 steps"),
        ({"sampler": "euler", "schedule": SCHEDULE}, "no noise schedule"),
        ({"batch": 0}, "batch must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, y, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 to 3"):
        sample(model, torch.tensor([4]))
