"""What only a GPU shows of `dig.capture`: the graph is the loop bit for bit, and the process survives a refusal."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dig
from dig.graphs import record
from dig.spec import create_model
from tests.helpers import randomize, relative_error

pytestmark = pytest.mark.gpu

RATE = 2.0**-10
"""The same as a Python float and as an fp32 tensor, so that results can be the same bits."""
STEPS = 5


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def adamw(parameters: Any, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, **{"lr": RATE, "fused": True, **options})


class Training:
    """A model, its average and its optimizer, and one step of them."""

    def __init__(self, model: nn.Module, *, make: Callable[..., torch.optim.Optimizer] = adamw) -> None:
        self.model = model.cuda().train()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make(self.model.parameters())

    def step(self, target: Tensor, *inputs: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = self.model(*inputs)
        loss = F.mse_loss(output.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 0.1)
        return loss

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        found |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            found |= {f"{key}.{name}": value for key, value in state.items() if isinstance(value, Tensor)}
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def layers() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 32))


def backbone(name: str) -> nn.Module:
    torch.manual_seed(3)
    family, _, options = name.partition(":")
    chosen = {"backend": options} if options else {}
    model = create_model(family, input_size=(16, 16), in_channels=1, num_classes=10, device="cuda", **chosen)
    return randomize(model, 0.02)


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return [(torch.randn(16, 32, device="cuda"), torch.randn(16, 64, device="cuda")) for _ in range(count)]


def images(count: int = STEPS) -> list[tuple[Tensor, ...]]:
    torch.manual_seed(5)
    return [
        (
            torch.randn(4, 2, 16, 16, device="cuda"),
            torch.randn(4, 1, 16, 16, device="cuda"),
            torch.randint(1000, (4,), device="cuda"),
            torch.randint(10, (4,), device="cuda"),
        )
        for _ in range(count)
    ]


def different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("name", ["DiG-S/4:triton", "DiT-S/4", "layers"])
def test_a_captured_step_of_training_is_the_eager_one(name: str) -> None:
    """Losses, weights, batch statistics, averages and moments; and capturing has moved nothing, nor drawn."""
    data: list[Any] = batches() if name == "layers" else images()
    make = layers if name == "layers" else lambda: backbone(name)
    eager, graph = Training(make()), Training(make())
    before, random = graph.tensors(), torch.cuda.get_rng_state()
    step = dig.capture(graph.step, *data[0], optimizer=graph.optimizer)
    after = graph.tensors()
    assert not different({key: after[key] for key in before}, before)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    losses = []
    for run in (eager.step, step):
        torch.manual_seed(6)  # a model in training drops labels
        losses.append([run(*inputs).detach().clone() for inputs in data])
    assert [loss.item() for loss in losses[1]] == [loss.item() for loss in losses[0]]
    assert not different(graph.tensors(), eager.tensors())


@pytest.mark.parametrize("fused", [True, False])
def test_a_schedule_takes_effect(fused: bool) -> None:
    """Numbers that are written between the calls; the optimizer was not made capturable."""
    eager = Training(layers(), make=lambda p: adamw(p, fused=fused, capturable=not fused, lr=torch.tensor(RATE).cuda()))
    graph = Training(layers(), make=lambda p: adamw(p, fused=fused))
    step = dig.capture(graph.step, *batches()[0], optimizer=graph.optimizer)
    for i, inputs in enumerate(batches()):
        eager.optimizer.param_groups[0]["lr"].fill_(RATE / 2**i)
        graph.optimizer.param_groups[0]["lr"] = RATE / 2**i
        eager.step(*inputs)
        step(*inputs)
    assert not different(graph.tensors(), eager.tensors())
    still = graph.tensors()
    graph.optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(dig.CaptureError, match=r"weight_decay of AdamW is 0\.5 now"):
        step(*batches()[0])
    assert not different(graph.tensors(), still)


def test_a_scheduler_of_pytorchs_takes_effect() -> None:
    graph = Training(layers())
    schedule = torch.optim.lr_scheduler.ExponentialLR(graph.optimizer, 0.5)
    step = dig.capture(graph.step, *batches()[0], optimizer=graph.optimizer)
    for inputs in batches():
        step(*inputs)
        schedule.step()
    assert graph.optimizer.param_groups[0]["lr"].item() == RATE / 2**STEPS


def test_random_numbers_differ_from_call_to_call_and_follow_the_seed() -> None:
    generator = torch.Generator("cuda").manual_seed(8)

    def draw(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout(x), torch.rand(64, device="cuda", generator=generator)

    def seeded(run: Callable[[Tensor], Any]) -> list[Tensor]:
        torch.manual_seed(7)
        generator.manual_seed(8)
        return [tensor.clone() for _ in range(3) for tensor in run(x)]

    x = torch.ones(64, device="cuda")
    step = dig.capture(draw, x, generators=[generator])
    assert step.draws
    found = seeded(step)
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[3])
    eager = seeded(draw)
    # By name, with what was drawn: once of 80 they differed, and nobody knows which.
    named = [f"{name} of call {call}" for call in range(3) for name in ("dropout", "own generator")]
    different = [
        (name, ours[:4].tolist(), theirs[:4].tolist())
        for name, ours, theirs in zip(named, found, eager, strict=True)
        if not torch.equal(ours, theirs)
    ]
    assert not different
    with pytest.raises(dig.CaptureError, match="a generator that the graph isn't told of"):
        dig.capture(draw, x)


@pytest.mark.parametrize("name", ["DiG-S/4:triton", "DiT-S/4"])
def test_inference_takes_new_inputs(name: str) -> None:
    """From the GPU and from the CPU; weights are read where they lie."""
    model = backbone(name).cuda().eval()

    @torch.no_grad()
    def predict(inputs: dict[str, Tensor]) -> Tensor:
        output: Tensor = model(inputs["x"], inputs["t"], inputs["y"])
        return output

    named = [{"x": x, "t": t, "y": y} for _, x, t, y in images()]
    step = dig.capture(predict, named[0])
    kept = [step(inputs).clone() for inputs in named]
    for inputs, output in zip(named, kept, strict=True):
        assert relative_error(output, predict(inputs)) < 1e-6
    assert not torch.equal(kept[0], kept[1])
    on_host = {key: value.cpu() for key, value in named[1].items()}
    assert torch.equal(step(on_host), kept[1])
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    assert relative_error(step(named[1]), predict(named[1])) < 1e-6
    assert not torch.equal(step(named[1]), kept[1])
    with pytest.raises(dig.CaptureError, match=r"input \[0\]\['x'\] is \(3, 1, 16, 16\) float32 now and was \(4, 1"):
        step({**named[0], "x": named[0]["x"][:3]})
    with pytest.raises(dig.CaptureError, match="capture this form too"):
        step({"x": named[0]["x"]})


def reads(x: Tensor) -> Tensor:
    return x * x.sum().item()


def waits(x: Tensor) -> Tensor:
    y = x * torch.randn_like(x)
    torch.cuda.synchronize()
    return y


def copies(x: Tensor) -> Tensor:
    return x * torch.rand_like(x) + torch.tensor([1.0, 2.0], device="cuda")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (reads, r"test_graphs_gpu.py, line \d+, reads a value from the GPU .*read it after the call"),
        (waits, r"test_graphs_gpu.py, line \d+, can't be in a CUDA graph .*nothing may wait for the GPU"),
        # Whether PyTorch shows the copy that is in it to a dispatch mode is its own affair.
        (
            copies,
            r"test_graphs_gpu.py, line \d+, (moves a tensor from the CPU|can't be in a CUDA graph .*torch.tensor\()",
        ),
    ],
)
def test_the_process_survives_what_can_not_be_captured(step: Any, message: str) -> None:
    """Streams, memory, random numbers, graphs from before and graphs from after."""
    x = torch.ones(2, device="cuda")
    before = dig.capture(lambda x: x + torch.rand_like(x), x)
    torch.manual_seed(1)
    drawn = before(x).clone()
    with pytest.raises(dig.CaptureError, match=message):
        dig.capture(step, x)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.manual_seed(1)
    assert torch.equal(before(x), drawn)
    torch.manual_seed(1)
    again = torch.rand(2, device="cuda")
    torch.manual_seed(1)
    after = dig.capture(lambda x: x + torch.rand_like(x), x)
    assert torch.equal(after(x) - x, again) or relative_error(after.outputs - x, again) < 1e-5
    if step is not reads:
        assert step(x).isfinite().all()  # without a graph it runs
    large = torch.randn(2**20, device="cuda")
    assert large.sum().isfinite()
    del large
    torch.cuda.empty_cache()


def test_a_failed_capture_leaves_everything_as_it_was() -> None:
    training = Training(layers())
    before = training.tensors()

    def step(target: Tensor, x: Tensor) -> float:
        return training.step(target, x).item()

    with pytest.raises(dig.CaptureError, match="reads a value"):
        dig.capture(step, *batches(1)[0], optimizer=training.optimizer)
    assert not different(training.tensors(), before)
    assert training.optimizer.param_groups[0]["lr"] == RATE
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_a_step_whose_gradients_overflow_is_skipped() -> None:
    """fp16: the fused optimizer skips on the GPU, and the scale goes on from where it was, as without a graph."""

    def trained(capturing: bool) -> tuple[dict[str, Tensor], list[float]]:
        training = Training(layers())
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=2)

        def step(target: Tensor, x: Tensor) -> None:
            training.optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                output = training.model(x)
            scaler.scale(F.mse_loss(output.float(), target)).backward()
            scaler.step(training.optimizer)
            scaler.update()

        inputs, scales = batches(), []
        inputs[1][0][0, 0] = torch.inf
        run: Any = step
        if capturing:
            run = dig.capture(step, *inputs[1], optimizer=training.optimizer, scaler=scaler)
            assert scaler.get_scale() == 8.0
        for pair in inputs:
            run(*pair)
            scales.append(scaler.get_scale())
        return training.tensors(), scales

    ours, theirs = trained(True), trained(False)
    assert ours[1] == theirs[1] == [8.0, 4.0, 4.0, 8.0, 8.0]
    assert not different(ours[0], theirs[0])
    plain = torch.optim.SGD([nn.Parameter(torch.ones(2, device="cuda"))], lr=0.1)
    with pytest.raises(dig.CaptureError, match=r"this SGD whether a gradient overflowed.*fused=True"):
        dig.capture(lambda: None, optimizer=plain, scaler=torch.amp.GradScaler("cuda"))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.5, fused=True),
        lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.5),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(RATE, device="cuda"), capturable=True, foreach=True),
    ],
)
def test_other_optimizers_begin_where_a_loop_begins(make: Any) -> None:
    eager, graph = Training(layers(), make=make), Training(layers(), make=make)
    step = dig.capture(graph.step, *batches()[0], optimizer=graph.optimizer)
    for inputs in batches():
        eager.step(*inputs)
        step(*inputs)
    assert not different(graph.tensors(), eager.tensors())


def test_gradients_are_added_up_where_the_step_never_zeroes_them() -> None:
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = adamw([weight])
    step = dig.capture(lambda x: (weight * x).sum().backward(), torch.ones(3, device="cuda"), optimizer=optimizer)
    for value in (1.0, 2.0):
        step(torch.full((3,), value))
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 3


def test_what_the_graph_reads_outlives_its_names() -> None:
    """A graph knows addresses; a script that lets go of the model must not take its memory away."""
    weights = [torch.full((2**16,), 2.0, device="cuda")]
    step = dig.capture(lambda x: x * weights[0], torch.ones(2**16, device="cuda"))
    weights.clear()
    gc.collect()
    others = [torch.zeros(2**16, device="cuda") for _ in range(8)]
    assert step(torch.ones(2**16)).sum().item() == 2 * 2**16
    del others


class Waits:
    """In a cycle, and waits for the GPU in its end, which a capture doesn't permit: windows of symmetric memory do."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        torch.cuda.synchronize()


def test_garbage_that_waits_for_the_gpu_does_not_break_a_capture() -> None:
    Waits()

    def step() -> torch.Tensor:
        Waits()
        alive = [[each] for each in range(100 * gc.get_threshold()[0])]
        return torch.full((4,), float(len(alive)), device="cuda")

    graph, result = record(step)
    graph.replay()
    assert result.tolist() == [100.0 * gc.get_threshold()[0]] * 4


def test_autocast_around_the_capture_is_refused() -> None:
    model = nn.Linear(2, 2, device="cuda")
    with (
        torch.autocast("cuda", dtype=torch.bfloat16),
        pytest.raises(dig.CaptureError, match="enter autocast within the step"),
    ):
        dig.capture(model, torch.ones(1, 2, device="cuda"))


def test_recording_bare_raises_what_the_function_raises() -> None:
    def wrong() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        record(wrong)
    graph, result = record(lambda: torch.ones(4, device="cuda") * 2)
    graph.replay()
    assert result.tolist() == [2.0] * 4
