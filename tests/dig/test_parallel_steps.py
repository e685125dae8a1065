"""Steps of a job of one, in this process: wrapped, captured, in parts, and averaged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dig.diffusion import build_loss
from dig.graphs import Captured, recording
from dig.training.inputs import step_inputs
from dig.training.parallel import joined, mesh_of_all, wrap
from dig.training.shares import local
from dig.training.step import TrainingStep
from tests.dig.fake_graph import capture_fake
from tests.dig.test_training_step import batch_of, config

pytestmark = pytest.mark.usefixtures("tiny_dig")


def test_graphs_of_a_job_end_before_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a group over NCCL waits for them for ever: tests/dig/test_parallel_gpu.py."""
    ended: list[str] = []

    class Graph:
        def reset(self) -> None:
            ended.append("graph")

    end = torch.distributed.destroy_process_group
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: (ended.append("groups"), end()))
    before = recording._ending.copy()
    graphs = [Graph(), Graph()]
    with joined("cpu", hang_seconds=30):
        for graph in graphs:
            recording._ending[-1].add(graph)
        del graph
        graphs.pop()  # It ended by itself.
    assert ended == ["graph", "groups"]
    assert recording._ending == before


def stepped(kind: Any, steps: int, **fields: Any) -> TrainingStep:
    run = config(**fields)
    torch.manual_seed(0)
    model = run.model.build()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    step = TrainingStep(run, model, build_loss("hybrid", device="cpu"), kind)
    torch.manual_seed(2)
    for number in range(steps):
        step.run(step_inputs(run, step.loss, batch_of(number), 10), run.learning_rate_at(number))
    return step


def whole(step: TrainingStep) -> dict[str, torch.Tensor]:
    tensors = step.tensors()
    return {name: getattr(one, "full_tensor", lambda one=one: one)().detach() for name, one in tensors.items()}


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_job_of_one_takes_the_steps_of_a_process(kind: str) -> None:
    fields: dict[str, Any] = {"accumulate": 2, "clip": 0.5, "ema": 0.75, "learning_rate": 1e-3}
    ours, theirs = whole(stepped(kind, 3, **fields)), whole(stepped(None, 3, **fields))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(("kind", "warmup"), [("ddp", 11), ("fsdp", 3)])
def test_a_captured_step_of_ranks_is_the_eager_one(kind: Any, warmup: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reducer takes part in the warm-up, weights are gathered into what it made; the capture has moved nothing."""
    warmups = []

    def capturing(*arguments: Any, **options: Any) -> Any:
        warmups.append(options["warmup"])
        return capture_fake(*arguments, **options, recorded=kind == "ddp")

    monkeypatch.setattr("dig.training.step.capture", capturing)
    monkeypatch.setattr("dig.training.parallel.wrapping.mesh_of_all", lambda device: mesh_of_all("cpu"))
    fields: dict[str, Any] = {"accumulate": 2, "clip": 0.5, "ema": 0.75, "learning_rate": 2.0**-7}
    graph = stepped(kind, 3, execution="graph", device="cuda", **fields)
    # PyTorch's notes on CUDA graphs: at least eleven with DistributedDataParallel.
    assert warmups == [warmup]
    ours, theirs = whole(graph), whole(stepped(kind, 3, **fields))
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.usefixtures("ranks")
def test_parts_of_a_batch_are_not_sent_one_by_one() -> None:
    reduced = []
    step = stepped("ddp", 0, accumulate=4)
    network: Any = step._network

    def count(_state, bucket):  # type: ignore[no-untyped-def]  # annotations as text are none that it takes
        reduced.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    network.register_comm_hook(None, count)
    for number in range(3):
        step.run(step_inputs(step.config, step.loss, batch_of(number), 10), 1e-4)
        if not number:
            reduced.clear()  # of the run before the first step, in which buckets are laid, too
    assert len(reduced) == 2 * len(set(reduced))
    asked = []
    step = stepped("fsdp", 0, accumulate=4)
    model: Any = step.model
    before = model.set_requires_gradient_sync
    model.set_requires_gradient_sync = lambda sync: (asked.append(sync), before(sync))
    step.run(step_inputs(step.config, step.loss, batch_of(0), 10), 1e-4)
    assert asked == [False, False, False, True]


@pytest.fixture
def cpu_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of which only the configuration says that it is on a GPU shards on the CPU."""
    monkeypatch.setattr("dig.training.parallel.wrapping.mesh_of_all", lambda _device: mesh_of_all("cpu"))


@pytest.mark.usefixtures("ranks", "cpu_mesh")
def test_a_captured_step_with_fsdp_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warm-up has moved nothing: shares of weights, averages and moments are put back."""

    def capturing(step: Any, *inputs: Any, optimizer: Any, **options: Any) -> Any:
        def recorder(run: Any, **_: Any) -> tuple[Any, Any]:
            return SimpleNamespace(replay=run), None

        device = torch.device("cpu")
        return Captured(step, inputs, device=device, optimizers=[optimizer], recorder=recorder, **options)

    monkeypatch.setattr("dig.training.step.capture", capturing)
    fields: dict[str, Any] = {"accumulate": 2, "clip": 0.5, "ema": 0.75, "learning_rate": 2.0**-7}
    graph = stepped("fsdp", 3, execution="graph", device="cuda", **fields)
    ours, theirs = whole(graph), whole(stepped("fsdp", 3, **fields))
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.usefixtures("ranks", "cpu_mesh")
@pytest.mark.parametrize(("execution", "kept"), [("eager", False), ("graph", True)])
def test_blocks_of_a_captured_step_are_gathered_once_for_all_parts(execution: str, kept: bool) -> None:
    step = stepped("fsdp", 0, accumulate=2, execution=execution, device="cuda")
    block: Any = step.model.get_submodule("blocks.0")
    whole_before: list[bool] = []

    def note(*_: object) -> None:
        whole_before.append(not hasattr(next(block.parameters()), "full_tensor"))

    block.register_forward_pre_hook(note, prepend=True)
    inputs = step_inputs(step.config, step.loss, batch_of(0), 10)
    for _ in range(2):
        step._update(inputs)
    assert whole_before == [False, kept, False, kept]
    assert hasattr(next(block.parameters()), "full_tensor")


@pytest.mark.usefixtures("ranks")
def test_an_average_is_drawn_with_as_it_is_now() -> None:
    """All of its weights, those that no block holds too, though no checkpoint comes between."""
    step = stepped("fsdp", 1)
    x, t, y = torch.randn(1, 1, 16, 16), torch.tensor([1]), torch.tensor([2])
    with torch.no_grad():
        step.ema(x, t, y)
        for parameter in step.ema.parameters():
            local(parameter).mul_(1.5)
        found = step.ema(x, t, y)
        step.ema.state_dict()  # PyTorch lets go of whatever is gathered.
        assert torch.equal(found, step.ema(x, t, y))


def test_what_can_not_be_wrapped() -> None:
    with pytest.raises(ValueError, match=r"parallel must be ddp or fsdp; got 'pipeline'"):
        wrap(torch.nn.Linear(1, 1), "pipeline")  # type: ignore[arg-type]
