"""Work beside the critical path changes when it is done, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dig import raster_weights
from dig.model import DiG, DiGConfig
from dig.ops import side_stream
from dig.ops.launch import launch_context, launches_early
from dig.ops.side_stream import mark, on_side_stream, side_work, wait
from dig.ops.swiglu import products
from tests.helpers import example, randomize

CONFIG = DiGConfig(input_size=(32, 64), depth=3, width=128, heads=2, num_classes=3, backend="triton")
SLOW = 2_000_000
"""Clock cycles, about a millisecond: longer than the work that it holds up."""


def test_outside_of_a_capture_it_is_nothing() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with side_work(device), on_side_stream():
        ones = torch.ones(2, device=device)
        point = mark()
    wait(point)
    assert point is None
    assert ones.tolist() == [1, 1]


@pytest.mark.gpu
def test_in_a_graph_what_comes_first_after_a_wait_is_not_launched_early() -> None:
    """On either stream, and nothing else is held up."""
    device, launched = torch.device("cuda"), []

    def early() -> bool:
        launched.append(torch.ones(1, device=device))
        return "launch_pdl" in launch_context(device).take_options()

    found = []
    stream = torch.cuda.Stream()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        with side_work(device):
            found += [early(), early()]
            with on_side_stream():
                found += [early(), early()]
            point = mark()
            found.append(early())
            wait(point)
            found += [early(), early()]
        found += [early(), early()]
    able = launches_early(device)
    assert found == [able and x for x in (False, True, False, True, True, False, True, False, True)]


def run_step(model: DiG, inputs: tuple[Tensor, ...], weight: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = model(*inputs)
    (output.float() * weight).sum().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


def run_forward(model: DiG, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        return [model(*inputs)]


def capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def hold_up(late: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.Stream]:
    """Let one of the streams sleep at each fork, or ``neither``; the list gets what was forked to."""
    forks = []
    fork = side_stream._Scope.fork

    def fork_late(scope: side_stream._Scope, stream: torch.cuda.Stream) -> None:
        forks.append(stream)
        fork(scope, stream)
        if late != "neither":
            with torch.cuda.stream(getattr(scope, late)):
                torch.cuda._sleep(SLOW)

    monkeypatch.setattr(side_stream._Scope, "fork", fork_late)
    return forks


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["neither", "side", "main", "ahead"])
@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize(
    ("mode", "batch"), [("train", 1), ("train", 2), ("forward", 1), ("forward", 2), ("forward, fused cast", 1)]
)
def test_a_graph_gives_the_bits_of_the_eager_step(
    mode: str, variant: str, batch: int, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two streams is held up: what is read too early, or written over too early, would differ."""
    size = {"input_size": (64, 128), "width": 640, "heads": 10} if mode == "forward, fused cast" else {}
    model = randomize(DiG(replace(CONFIG, variant=variant, **size))).eval().cuda()
    inputs = example(model, batch)
    fused = []
    prepare = raster_weights.project_up_preparing

    def prepare_counted(*arguments: Any) -> list[Tensor]:
        fused.append(products.fuses_cast(arguments[0], len(arguments[1]) // 2, arguments[2], len(arguments[3])))
        return prepare(*arguments)

    monkeypatch.setattr(raster_weights, "project_up_preparing", prepare_counted)
    weight = torch.randn(batch, 2 * model.in_channels, *model.input_size, device="cuda")

    def run() -> list[Tensor]:
        return run_step(model, inputs, weight) if mode == "train" else run_forward(model, inputs)

    expected = [tensor.clone() for tensor in run()]
    assert fused == ([True] * (CONFIG.depth - 1) if mode == "forward, fused cast" else [])
    forks = hold_up(late, monkeypatch)
    graph, results = capture(run)
    assert len(forks) > CONFIG.depth
    for _ in range(3):
        for tensor in results:
            tensor.fill_(float("nan"))
        graph.replay()
        for actual, wanted in zip(results, expected, strict=True):
            assert torch.equal(actual, wanted)


SMALL = replace(CONFIG, input_size=(6, 10), depth=3, width=64, heads=1)


def small() -> DiG:
    return randomize(DiG(SMALL)).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def gradients_of(model: DiG, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    model.zero_grad()
    model(*inputs).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_kept_graph_can_be_gone_back_through_again(batch: int) -> None:
    """A block lets go of what it saved as it goes, but not then."""
    model = small()
    loss = model(*example(model, batch)).square().mean()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss.backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
