"""`dig.capture` as far as a CPU shows it: warm-up that is put back, inputs, optimizers.

`tests.dig.fake_graph` replaces the graph; its replay runs the step again on the same tensors. What only a
GPU can tell is in test_graphs_gpu.py.
"""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dig
from dig.graphs.optimizers import GraphOptimizer
from dig.graphs.recording import CaptureError, garbage_collected_before
from dig.graphs.watch import Journal
from tests.dig.fake_graph import CPU, capture_fake

RATE = 2.0**-7
"""The same as a Python float and as an fp32 tensor, so that results can be the same bits."""


class Training:
    """A small run: everything that a step of training may move."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer] | None = None, *, zero: str = "start") -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = (make or fused_adamw)(self.model.parameters())
        self.zero = zero
        self.count = torch.zeros(())

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.zero == "start":
            self.optimizer.zero_grad()
        if self.zero == "in place":
            self.optimizer.zero_grad(set_to_none=False)
        loss = F.mse_loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        if self.zero == "end":
            self.optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(self.average.parameters(), self.model.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)
            self.count += 1
        return {"loss": loss, "count": self.count.clone()}

    def tensors(self) -> list[Tensor]:
        states = [self.optimizer.state.get(p, {}) for p in self.model.parameters()]
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*self.model.state_dict().values(), *self.average.state_dict().values(), *moments, self.count]


def fused_adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **{"lr": RATE, "fused": True, **options})


def fused_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9, nesterov=True, fused=True)


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)) for _ in range(count)]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_importing_dig_takes_no_torch() -> None:
    code = "import sys, dig; assert 'torch' not in sys.modules; dig.capture; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'captures'"):
        _ = dig.captures  # type: ignore[attr-defined]


@pytest.mark.parametrize("zero", ["start", "end", "in place"])
@pytest.mark.parametrize("make", [fused_adamw, fused_sgd])
def test_capturing_moves_nothing_and_the_first_call_is_the_first_step(make: Any, zero: str) -> None:
    """Weights, batch statistics, averages, moments and counters; however gradients are zeroed."""
    eager, graph = Training(make, zero=zero), Training(make, zero=zero)
    before = copies([*graph.model.state_dict().values(), *graph.average.state_dict().values(), graph.count])
    step = capture_fake(graph.step, *batches()[0], optimizer=graph.optimizer)
    after = [*graph.model.state_dict().values(), *graph.average.state_dict().values(), graph.count]
    assert same(before, copies(after))
    for x, y in batches():
        found, expected = step(x, y), eager.step(x, y)
        assert found is step.outputs
        assert torch.equal(found["loss"], expected["loss"].detach())
        assert torch.equal(found["count"], expected["count"])
    assert same(copies(graph.tensors()), copies(eager.tensors()))


def test_random_numbers_are_those_of_the_loop() -> None:
    """Warm-up draws none of them; each call draws anew, and follows the seed."""
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(8)

    def draw(x: Tensor) -> Tensor:
        return F.dropout(x) + torch.rand(8, generator=generator)

    step = capture_fake(draw, torch.ones(8), generators=[generator])
    assert step.draws
    found = [step(torch.ones(8)).clone() for _ in range(2)]
    assert not torch.equal(*found)
    torch.manual_seed(7)
    generator.manual_seed(8)
    assert same(found, [draw(torch.ones(8)) for _ in range(2)])


def test_a_run_that_has_begun_goes_on() -> None:
    """State that exists is put back to what it was, not to zeros."""
    eager, graph = Training(), Training()
    for training in (eager, graph):
        training.step(*batches()[0])
    step = capture_fake(graph.step, *batches()[0], optimizer=graph.optimizer)
    for x, y in batches()[1:]:
        step(x, y)
        eager.step(x, y)
    assert same(copies(graph.tensors()), copies(eager.tensors()))


def test_gradients_are_added_up_where_the_step_never_zeroes_them() -> None:
    """One that a run wrote into stays, zeroed, so that the graph adds to it as a loop would."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = fused_adamw([weight])
    step = capture_fake(lambda x: (weight * x).sum().backward(), torch.ones(3), optimizer=optimizer)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(3))
    for value in (1.0, 2.0):
        step(torch.full((3,), value))
    assert torch.equal(weight.grad, torch.full((3,), 3.0))


def test_a_schedule_takes_effect() -> None:
    """Numbers written into the groups, and a scheduler of PyTorch's; the rate stays one tensor."""
    eager, graph = Training(), Training()
    rates = [torch.optim.lr_scheduler.LinearLR(training.optimizer, 0.1, 1.0, 3) for training in (eager, graph)]
    step = capture_fake(graph.step, *batches()[0], optimizer=graph.optimizer)
    rate = graph.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    for x, y in batches():
        step(x, y)
        eager.step(x, y)
        for schedule in rates:
            schedule.step()
    for found, expected in zip(copies(graph.tensors()), copies(eager.tensors()), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    graph.optimizer.param_groups[0]["lr"] = 0.5
    step(*batches()[0])
    assert graph.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5
    graph.optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    step(*batches()[0])
    assert rate.item() == 0.25


def test_what_the_graph_holds_fast_can_not_be_changed_silently() -> None:
    training = Training()
    step = capture_fake(training.step, *batches()[0], optimizer=training.optimizer)
    group = training.optimizer.param_groups[0]
    before = copies(training.tensors())
    group["weight_decay"] = 0.5
    with pytest.raises(CaptureError, match=r"weight_decay of AdamW is 0\.5 now and was 0\.01 at the capture"):
        step(*batches()[0])
    assert same(before, copies(training.tensors()))
    group["weight_decay"] = 0.01
    step(*batches()[0])
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    with pytest.raises(CaptureError, match="AdamW was loaded or given parameters after the capture"):
        step(*batches()[0])

    plain = Training(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    step = capture_fake(plain.step, *batches()[0], optimizer=plain.optimizer)
    plain.optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(CaptureError, match=r"lr of SGD is 0\.2 now and was 0\.1 .* make it with fused=True"):
        step(*batches()[0])


def test_an_optimizer_is_made_fit_in_place_and_put_back_if_the_capture_fails() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.125}])
    optimizer.state[weight] = {"step": 7, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    prepared = GraphOptimizer(optimizer, CPU)
    group, state = optimizer.param_groups[0], optimizer.state[weight]
    assert group["capturable"]
    assert isinstance(group["lr"], Tensor)
    assert group["lr"].dtype == torch.float32
    assert isinstance(state["step"], Tensor)
    assert state["step"].item() == 7
    prepared.undo()
    assert (group["capturable"], group["lr"], state["step"]) == (False, 0.125, 7)
    with pytest.raises(CaptureError, match="AdamW has parameters on cpu, the graph runs on cuda; move the model first"):
        GraphOptimizer(optimizer, torch.device("cuda"))


def test_a_step_whose_gradients_overflow_is_skipped() -> None:
    """By the fused optimizer itself, and the scaler's own state goes on from where it was."""
    trained = []
    for capturing in (False, True):
        weight = nn.Parameter(torch.ones(3))
        optimizer = fused_adamw([weight])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

        def step(x: Tensor, weight: Any = weight, optimizer: Any = optimizer, scaler: Any = scaler) -> None:
            optimizer.zero_grad()
            scaler.scale((weight * x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

        run: Any = step
        if capturing:
            run = capture_fake(step, torch.full((3,), torch.inf), optimizer=optimizer, scaler=scaler)
            assert scaler.get_scale() == 8.0
        scales = []
        for value in (1.0, torch.inf, 1.0, 2.0, 3.0):
            run(torch.full((3,), value))
            scales.append(scaler.get_scale())
        trained.append((weight.detach().clone(), scales))
    assert trained[1][1] == trained[0][1] == [8.0, 4.0, 4.0, 8.0, 8.0]
    assert torch.equal(trained[1][0], trained[0][0])


def test_inputs_are_copied_wherever_they_are_nested() -> None:
    def step(first: Tensor, rest: dict[str, Any], scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        return first * scale, {"sum": rest["x"] + rest["pair"][1]}

    example = (torch.ones(2), {"x": torch.ones(3), "pair": (None, torch.ones(3))}, 2.0)
    run = capture_fake(step, *example)
    product, sums = run(torch.full((2,), 3.0), {"x": torch.ones(3), "pair": (None, torch.zeros(3))}, 2.0)
    assert product.tolist() == [6, 6]
    assert sums["sum"].tolist() == [1, 1, 1]
    assert torch.equal(example[0], torch.ones(2))  # the example is the caller's
    kept = product.clone()
    run.inputs[0].fill_(1.0)
    assert run(run.inputs[0], run.inputs[1], 2.0)[0].tolist() == [2, 2]
    assert kept.tolist() == [6, 6]


def test_a_result_lets_go_of_what_the_backward_pass_would_need() -> None:
    weight = nn.Parameter(torch.ones(3))
    run = capture_fake(lambda x: (weight * x).sum(), torch.ones(3))
    assert not run(torch.ones(3)).requires_grad


def test_a_gradient_of_an_input_is_not_added_up() -> None:
    run = capture_fake(lambda x: (x * x).sum().backward(), torch.ones(3, requires_grad=True))
    assert run.inputs[0].is_leaf
    assert run.inputs[0].requires_grad


def test_what_is_compiled_stays_so() -> None:
    """The runs under watch leave torch.compile's work to those that follow."""
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph

    model = torch.compile(nn.Linear(3, 3), backend=backend)
    step = capture_fake(model, torch.ones(2, 3))
    assert compiled == [1]
    assert torch.equal(step(torch.ones(2, 3)), model(torch.ones(2, 3)))


def test_a_part_can_stand_for_the_step_in_warm_up() -> None:
    runs: list[str] = []
    step = capture_fake(
        lambda x: runs.append("step") or x + 1, torch.zeros(2), warm_up=lambda x: runs.append("part") or x, warmup=4
    )
    assert runs == ["part"] * 4 + ["step"]
    assert step(torch.ones(2)).tolist() == [2, 2]
    assert not step.draws


def test_a_journal_puts_overlapping_tensors_back() -> None:
    whole = torch.arange(6.0)
    part = whole[2:4]
    for order in ((part, whole), (whole, part)):
        journal = Journal()
        for tensor in order:
            journal.note(tensor)
            tensor.add_(10)
        journal.restore()
        assert whole.tolist() == [0, 1, 2, 3, 4, 5]


class InACycle:
    """Says so when it is collected, as what frees memory of CUDA in its end does."""

    def __init__(self, ended: list[str], name: str) -> None:
        self.ended, self.name, self.itself = ended, name, self

    def __del__(self) -> None:
        self.ended.append(self.name)


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_before_a_capture_and_not_within(collecting: bool) -> None:
    ended: list[str] = []
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        InACycle(ended, "before")
        with suppress(ValueError), garbage_collected_before():
            assert ended == ["before"]
            InACycle(ended, "within")
            # More than the collector lets pass, and of those that live: it would look at them three times over.
            alive = [[each] for each in range(10 * gc.get_threshold()[0])]
            assert len(alive) > 1000
            assert ended == ["before"]
            raise ValueError
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if was else gc.disable)()
    gc.collect()
    assert ended == ["before", "within"]


def test_capturing_stands_once() -> None:
    """Whoever needs a graph takes `dig.graphs`, with what it knows of streams, memory and errors."""
    root = Path(dig.__file__).parents[1]
    sources = [path for folder in ("dig", "baselines", "bench") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 50
    found = [path for path in sources if re.search(r"cuda\.graph\(|CUDAGraph\(|make_graphed", path.read_text())]
    assert [path.relative_to(root).as_posix() for path in found] == ["dig/graphs/recording.py"]
