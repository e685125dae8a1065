"""What `dig.capture` refuses, and how: one line that names the operation or the input, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dig
from dig.graphs.capturing import capture
from dig.graphs.inputs import StaticInputs
from dig.graphs.optimizers import GraphOptimizer, prepare_scaler
from dig.graphs.recording import CaptureError
from dig.graphs.watch import Journal, Watch
from tests.dig.fake_graph import CPU, capture_fake
from tests.dig.test_graphs import RATE, Training, batches, copies, fused_adamw, same


def test_a_cpu_is_refused_with_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so nothing is refused; test_graphs_gpu.py captures")
    with pytest.raises(
        dig.CaptureError, match="needs an NVIDIA GPU, and torch sees none; on a CPU call the step itself"
    ):
        dig.capture(lambda x: x + 1, torch.zeros(2))


def read_value(x: Tensor) -> Tensor:
    return x * x.sum().item()


def branch(x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 0 else x


def mask(x: Tensor) -> Tensor:
    return x[x > 0]


def mask_written(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = y[x > 0] * 2
    return y


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (read_value, r"test_graphs_refused.py, line \d+, reads a value from the GPU .*item\(\).*after the call"),
        (branch, "reads a value from the GPU"),
        (mask, "indexes by a mask, which makes a tensor whose size depends on values.*use torch.where"),
        (mask_written, "indexes by a mask"),
        (torch.nonzero, r"makes a tensor whose size depends on values \(nonzero\)"),
        (torch.unique, "makes a tensor whose size depends on values"),
        (
            lambda x: torch.randn(3, generator=torch.Generator()),
            r"a generator that the graph isn't told of; pass generators=\[...\]",
        ),
    ],
)
def test_what_a_graph_can_not_hold_is_named_with_its_line(step: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture_fake(step, torch.randn(5) + 1)


def test_what_a_graph_can_hold_is_not_refused() -> None:
    def step(x: Tensor, at: Tensor) -> Tensor:
        y = x.clone()
        y[x > 0] = 0.0  # a masked_fill
        y[0] = 3.0
        return y[at]

    assert capture_fake(step, torch.randn(5), torch.tensor([0, 1]))(torch.ones(5), torch.tensor([0, 2])).tolist() == [
        3,
        0,
    ]


def test_tensors_of_the_host_are_refused() -> None:
    """On the meta device, which replaces the GPU: what is on the CPU is then elsewhere."""
    counter = torch.zeros(3)
    meta = torch.device("meta")

    def judged(step: Callable[[], Any]) -> None:
        with Watch(meta, Journal(), earlier=Watch(meta, Journal())):
            step()

    with pytest.raises(CaptureError, match=r"changes a tensor on the CPU, \(3,\) float32, which replays"):
        judged(lambda: counter.add_(1))
    x = torch.zeros(3, device="meta")
    with pytest.raises(
        CaptureError, match=r"moves a tensor from the CPU, \(3,\) float32.*pass it to the step as an input"
    ):
        judged(lambda: torch.empty_like(x).copy_(counter))
    with pytest.raises(CaptureError, match=r"moves a tensor to the CPU.*move it after the call"):
        judged(lambda: counter.copy_(x))
    with pytest.raises(CaptureError, match=r"draws random numbers on the CPU, .* draw them on the GPU"):
        judged(lambda: torch.randn(3))
    judged(lambda: F.dropout(torch.empty_like(x)))
    with pytest.raises(CaptureError, match="by numbers on the CPU"):
        judged(lambda: x[torch.tensor([0, 1])])


def test_caches_may_be_filled_in_the_first_run() -> None:
    cache: list[float] = []

    def step(x: Tensor) -> Tensor:
        if not cache:
            cache.append(x.sum().item())
        return x * cache[0]

    assert capture_fake(step, torch.ones(2))(torch.ones(2)).tolist() == [2, 2]


def test_a_failed_capture_leaves_everything_as_it_was() -> None:
    training, other = Training(), Training()
    before = copies(training.tensors())

    def step(x: Tensor, y: Tensor) -> float:
        return training.step(x, y)["loss"].item()

    with pytest.raises(CaptureError, match="reads a value"):
        capture_fake(step, *batches()[0], optimizer=training.optimizer)
    assert same(before, copies(training.tensors()))
    assert not training.optimizer.state
    assert training.optimizer.param_groups[0]["lr"] == RATE
    assert all(parameter.grad is None for parameter in training.model.parameters())
    for x, y in batches():
        training.step(x, y)
        other.step(x, y)
    assert same(copies(training.tensors()), copies(other.tensors()))


def test_state_that_nobody_gave_is_refused() -> None:
    training = Training()
    with pytest.raises(CaptureError, match="moves an optimizer that capture wasn't given, AdamW; pass optimizer="):
        capture_fake(training.step, *batches()[0])
    weight = nn.Parameter(torch.ones(3))

    def adds_up(x: Tensor) -> None:
        (weight * x).sum().backward()

    with pytest.raises(CaptureError, match=r"that an earlier run of the step made.*run the step once before"):
        capture_fake(adds_up, torch.ones(3))


def test_a_step_that_says_what_it_moves_may_write_into_what_its_earlier_runs_made() -> None:
    """As a model that FSDP gathers does."""
    weight, buffer = torch.ones(3), list[Tensor]()

    def gathers(x: Tensor) -> Tensor:
        if not buffer:
            buffer.append(torch.empty(3))
        buffer[0].copy_(weight)
        weight.add_(x)
        return buffer[0] * 2

    with pytest.raises(CaptureError, match="that an earlier run of the step made"):
        capture_fake(gathers, torch.ones(3))
    weight.fill_(1)
    captured = capture_fake(gathers, torch.ones(3), moves=[weight])
    assert weight.tolist() == [1, 1, 1]
    assert [captured(torch.full((3,), x)).tolist() for x in (1.0, 2.0)] == [[2, 2, 2], [4, 4, 4]]
    assert weight.tolist() == [4, 4, 4]


def test_memory_that_a_step_gives_back_is_not_put_back() -> None:
    """FSDP frees under a tensor what it gathered there."""
    journal = Journal()
    kept, freed, empty = torch.ones(3), torch.ones(4), torch.ones(0)
    for tensor in (kept, freed[1:], empty):
        journal.note(tensor)
    kept.fill_(2)
    freed.untyped_storage().resize_(0)
    journal.restore()
    assert kept.tolist() == [1, 1, 1]


def test_a_schedule_within_the_step_is_refused() -> None:
    for make in (fused_adamw, lambda parameters: torch.optim.SGD(parameters, lr=0.1)):
        training = Training(make)
        schedule = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, 0.9)

        def step(x: Tensor, y: Tensor, training: Training = training, schedule: Any = schedule) -> None:
            training.step(x, y)
            rate = training.optimizer.param_groups[0]["lr"]
            if isinstance(rate, Tensor):
                rate.mul_(0.9)
            else:
                schedule.step()

        with pytest.raises(CaptureError, match="the step changes its optimizer's settings"):
            capture_fake(step, *batches()[0], optimizer=training.optimizer)


class Keeping(torch.optim.Optimizer):
    """One of another package, with a state that begins in a way of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("scale", torch.full_like(parameter, 5.0))


class Counting(torch.optim.Optimizer):
    """One that counts in Python, as some packages' do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1


def test_optimizers_that_a_graph_would_get_wrong_are_refused() -> None:
    for make, message in (
        (Counting, "Counting counts 'step' in Python"),
        (Keeping, "how the state of Keeping begins isn't known here; do one step without"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "SGD's first step with dampening"),
    ):
        training = Training(make)
        with pytest.raises(CaptureError, match=message):
            capture_fake(training.step, *batches()[0], optimizer=training.optimizer)


def test_a_scaler_needs_an_optimizer_that_skips_by_itself() -> None:
    weight = nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plain = GraphOptimizer(torch.optim.SGD([weight], lr=0.1), CPU)
    with pytest.raises(CaptureError, match=r"GradScaler asks the GPU before every step of this SGD.*fused=True"):
        prepare_scaler(scaler, [plain], CPU)
    prepare_scaler(torch.amp.GradScaler("cpu", enabled=False), [plain], CPU)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(3), {"x": torch.zeros(4)}, 1), r"input \[0\] is \(3,\) float32 now and was \(2,\) float32"),
        ((torch.zeros(2), {"x": torch.zeros(4).double()}, 1), r"input \[1\]\['x'\] is \(4,\) float64 now"),
        ((torch.zeros(2), {"x": torch.zeros(4)}, 2), r"input \[2\] is int 2 now and was int 1 .*pass what changes"),
        ((torch.zeros(2), {"x": torch.zeros(4)}, True), r"input \[2\] is bool True now"),
        ((torch.zeros(2), {"x": 4}, 1), r"input \[1\]\['x'\] is int 4 now and was \(4,\) float32.*pass a tensor"),
        ((torch.zeros(2), {"y": torch.zeros(4)}, 1), "capture this form too"),
        ((torch.zeros(2),), "capture this form too"),
        ((torch.zeros(2), {"x": torch.zeros(4, device="meta")}, 1), r"input \[1\]\['x'\] is on meta, the graph on cpu"),
    ],
)
def test_other_inputs_are_refused_by_name(inputs: tuple[Any, ...], message: str) -> None:
    static = StaticInputs((torch.ones(2), {"x": torch.ones(4)}, 1), CPU)
    with pytest.raises(CaptureError, match=message):
        static.fill(inputs)
    assert torch.equal(static.tree[0], torch.ones(2))


def test_inputs_that_are_not_dense_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"input \[0\] is torch.sparse_coo"):
        StaticInputs((torch.ones(2).to_sparse(),), CPU)


def test_too_little_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup must be at least 3; got 1"):
        capture(lambda: None, warmup=1)
