"""Gradients that are handed to autograd later than their blocks end are those of block after block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dig import raster, raster_block, raster_gradients
from dig.model import DiG
from dig.ops import side_stream
from tests.helpers import example, randomize
from tests.ops.test_side_stream import SMALL, capture, gradients_of, hold_up, small

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ("in one piece", "a block late")


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gradients go a way, or ``block after block``, captured or not."""
    monkeypatch.setattr(raster_gradients, "gathers", lambda: way in WAYS)
    monkeypatch.setattr(raster_gradients, "lags", lambda: way == "a block late")


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    """To the bit."""
    return all(
        ours is right if ours is None or right is None else torch.equal(ours, right)
        for ours, right in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_they_are_those_of_block_after_block(way: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with frozen parameters and a shared one too, and added to those of the pass before."""
    model = small()
    inputs = example(model, batch)
    model.blocks[1].mlp.down_proj.weight.requires_grad_(False)
    model.blocks[2].attn.o_proj.weight = model.blocks[0].attn.o_proj.weight

    def run() -> list[Tensor | None]:
        once = [None if gradient is None else gradient.clone() for gradient in gradients_of(model, inputs)]
        model(*inputs).square().sum().backward()
        return [*once, *(parameter.grad for parameter in model.parameters())]

    expected = run()
    joined: list[bool] = []
    take(way, monkeypatch)
    monkeypatch.setattr(side_stream.Across, "join", lambda across: joined.append(True))
    assert same(run(), expected)
    assert joined == [True, True]


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_parameters_see_and_change_what_they_always_do(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    inputs = example(model)
    seen: dict[str, Tensor] = {}

    def double(name: str, gradient: Tensor) -> Tensor:
        seen[name] = gradient.clone()
        return 2 * gradient

    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: double(name, gradient))
    expected, first = gradients_of(model, inputs), dict(seen)
    seen.clear()
    take(way, monkeypatch)
    assert same(gradients_of(model, inputs), expected)
    assert same([seen[name] for name in first], [*first.values()])


@pytest.mark.parametrize("way", WAYS)
def test_those_that_are_asked_for_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    inputs = example(model, 2)
    wanted = [model.blocks[1].attn.o_proj.weight, model.blocks[2].mlp.down_proj.weight]
    expected = torch.autograd.grad(model(*inputs).square().mean(), wanted)
    take(way, monkeypatch)
    found = torch.autograd.grad(model(*inputs).square().mean(), wanted)
    assert same([*found], [*expected])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    table = model.y_embedder.embedding_table.weight.requires_grad_()
    gathered = gradients_of(model, inputs)
    take("block after block", monkeypatch)
    assert same(gathered, gradients_of(model, inputs))
    assert [gradient is not None for gradient in gathered] == [p is table for p in model.parameters()]


@pytest.mark.parametrize("way", [*WAYS, "block after block"])
@pytest.mark.parametrize("skip", ["none", "identity-init"])
def test_when_they_are_handed_on(skip: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block late: when the next block was gone back through, and not when another one was."""
    model = randomize(DiG(replace(SMALL, depth=5, skip=skip))).to(DEVICE)
    inputs = example(model)
    events: list[str] = []
    left = iter(reversed(range(5)))
    backward_pass = raster_block.backward_pass

    def noted(*arguments: Any, **named: Any) -> Any:
        events.append(f"back through {next(left)}")
        return backward_pass(*arguments, **named)

    def hand(number: int) -> None:
        if events[-1] != f"gradients of {number}":
            events.append(f"gradients of {number}")

    monkeypatch.setattr(raster_block, "backward_pass", noted)
    for i, block in enumerate(model.blocks):
        for weight in block.weights():
            if weight is not None:
                weight.register_post_accumulate_grad_hook(lambda _weight, i=i: hand(i))
    take(way, monkeypatch)
    gradients_of(model, inputs)
    back, handed = [[f"{what} {i}" for i in range(5)] for what in ("back through", "gradients of")]
    if way == "a block late":
        assert events == [
            back[4], back[3], handed[4], back[2], handed[3], back[1], handed[2], back[0], handed[1], handed[0]
        ]  # fmt: skip
    elif way == "in one piece":
        assert events[:5] == back[::-1]
        assert set(events[5:]) == set(handed)
    else:
        assert events == [event for i in reversed(range(5)) for event in (back[i], handed[i])]


class Stream:
    """A stream on paper: how much was launched on it, and how much of each it is known to be after."""

    def __init__(self) -> None:
        self.launched = 0
        self.after: dict[Stream, int] = {}

    def record_event(self) -> dict[Stream, int]:
        return {**self.after, self: self.launched}

    def wait_event(self, event: dict[Stream, int]) -> None:
        for stream, count in event.items():
            self.after[stream] = max(count, self.after.get(stream, 0))

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())


class OnPaper:
    """A capture on paper, with side streams that everything in fact runs in order on.

    Attributes:
        early: Blocks whose gradients somebody was given while the side stream still computed them.
        beside: Those that were given while it still did later work.
        forks: How many pieces of work went to it.
    """

    def __init__(self, model: DiG, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main, self.side, self.ahead = Stream(), Stream(), Stream()
        self.early: set[int] = set()
        self.beside: set[int] = set()
        self._left: dict[int, int] = {}
        paper = self

        class Scope(side_stream._Scope):
            def __init__(self, _device: torch.device, *, third: bool = False) -> None:
                self.main, self.side = paper.main, paper.side  # type: ignore[assignment]
                self.ahead = paper.ahead if third else paper.side  # type: ignore[assignment]
                self.held = []
                self.launch = SimpleNamespace(stream_waits=lambda _stream: None)  # type: ignore[assignment]
                for stream in self._others():
                    self.fork(stream)

        @contextmanager
        def launch(stream: Stream) -> Iterator[None]:
            stream.launched += 1
            yield

        backward_pass = raster_block.backward_pass
        train_block = raster_block.train_block
        of_part: dict[Any, int] = {}

        def noted_forward(*arguments: Any) -> Any:
            # The blocks are called in their order, however often.
            of_part[arguments[-1]] = len(of_part) % len(model.blocks)
            return train_block(*arguments)

        def noted_backward(*arguments: Any, part: Any, **named: Any) -> Any:
            found = backward_pass(*arguments, part=part, **named)
            self._left[of_part[part]] = self.side.launched
            return found

        monkeypatch.setattr(side_stream, "_may_fork", lambda _device: True)
        monkeypatch.setattr(side_stream, "_Scope", Scope)
        monkeypatch.setattr(torch.cuda, "stream", launch)
        monkeypatch.setattr(raster_block, "train_block", noted_forward)
        monkeypatch.setattr(raster_block, "backward_pass", noted_backward)
        for i, block in enumerate(model.blocks):
            for weight in block.weights():
                if weight is not None and weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(lambda _weight, i=i: self._hand(i))

    def _hand(self, block: int) -> None:
        waited = self.main.after.get(self.side, 0)
        if waited < self._left[block]:
            self.early.add(block)
        if waited < self.side.launched:
            self.beside.add(block)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_they_are_handed_on_when_they_are_there(way: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a block late without waiting for the block after it, whose own are computed meanwhile."""
    model = small()
    inputs = example(model, batch)
    expected = gradients_of(model, inputs)
    paper = OnPaper(model, monkeypatch)
    assert not raster_gradients.gathers()
    monkeypatch.setattr(raster_gradients, "lags", lambda: way == "a block late")
    assert same(gradients_of(model, inputs), expected)
    assert (paper.early, paper.beside) == (set(), {1, 2} if way == "a block late" else set())
    assert paper.side.launched > 3 * 3
    assert paper.main.after[paper.side] == paper.side.launched


def reach_one(model: DiG, loss: Tensor) -> None:
    loss.backward(inputs=[*model.blocks[1].parameters()])


def reach_two_again(model: DiG, loss: Tensor) -> None:
    for _ in range(2):
        loss.backward(inputs=[*model.blocks[2].parameters()], retain_graph=True)
    loss.backward(inputs=[*model.blocks[1].parameters()], retain_graph=True)
    loss.backward()


def reach_all(_model: DiG, loss: Tensor) -> None:
    loss.backward()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("frozen", "go_back"),
    [((), reach_one), ((), reach_two_again), (("blocks.0.", "embedder"), reach_all), (("blocks.0.",), reach_all)],
)
def test_a_block_with_none_after_it_waits_for_its_own(
    frozen: tuple[str, ...], go_back: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pass leaves out."""
    model = small()
    inputs = example(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(word in name for word in frozen))

    def run() -> list[Tensor | None]:
        model.zero_grad()
        go_back(model, model(*inputs).square().mean())
        return [parameter.grad for parameter in model.parameters()]

    expected = run()
    assert any(gradient is not None for gradient in expected)
    paper = OnPaper(model, monkeypatch)
    monkeypatch.setattr(raster_gradients, "lags", lambda: way == "a block late")
    assert same(run(), expected)
    assert not paper.early
    assert paper.main.after[paper.side] == paper.side.launched


@pytest.mark.parametrize("seen", ["a hook", "run again"])
def test_blocks_that_somebody_watches_or_that_run_again_keep_theirs(seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    asked: list[Any] = []
    monkeypatch.setattr(raster_gradients, "gathers", lambda: True)
    monkeypatch.setattr(raster, "Gathered", lambda *given: asked.append(given))
    if seen == "a hook":
        model.get_submodule("blocks.1.mlp").register_forward_hook(lambda *_: None)
    else:
        model.recompute_blocks(preserve_rng_state=False)
    gradients_of(model, example(model, 1))
    assert not asked


def test_where_processes_may_reduce_them_they_go_on_a_block_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster_gradients, "uses_side_stream", lambda: True)
    assert raster_gradients.gathers()
    assert not raster_gradients.lags()
    with torch.no_grad():
        assert not raster_gradients.gathers()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert raster_gradients.gathers()
    assert raster_gradients.lags()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel_sends_them_while_the_pass_goes_on(
    unused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a batch that aren't sent are added up, and a parameter that nothing uses gets none."""
    model = small()
    inputs = example(model)
    if unused:
        model.unused = nn.Parameter(torch.zeros(3, device=DEVICE))
    events: list[str] = []
    backward_pass = raster_block.backward_pass

    def noted(*arguments: Any, **named: Any) -> Any:
        events.append("block")
        return backward_pass(*arguments, **named)

    def send(_state: None, bucket: Any) -> torch.futures.Future[Tensor]:
        events.append("sent")
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[DEVICE] if DEVICE == "cuda" else None)
        future.set_result(bucket.buffer())
        return future

    # PyTorch refuses a hook whose annotations are text.
    send.__annotations__ = {}

    def run() -> list[Tensor | None]:
        network = DistributedDataParallel(
            model, find_unused_parameters=unused, gradient_as_bucket_view=True, bucket_cap_mb=1e-3
        )
        network.register_comm_hook(None, send)
        model.zero_grad()
        for _ in range(2):
            with network.no_sync():
                network(*inputs).square().mean().backward()
            events.clear()
            network(*inputs).square().sum().backward()
        return [parameter.grad.clone() if parameter.grad is not None else None for parameter in model.parameters()]

    monkeypatch.setattr(raster_block, "backward_pass", noted)
    expected = run()
    monkeypatch.setattr(raster_gradients, "gathers", lambda: True)
    assert same(run(), expected)
    if not unused:
        # PyTorch has laid its buckets anew, which it doesn't where it looks for what is unused. A b is a block.
        assert re.fullmatch("s*bbs+bs+", "".join(event[0] for event in events))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("by_block", [True, False])
def test_fully_sharded_blocks_keep_theirs(by_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights are read when they are called. Those of a model that is sharded whole are there before."""
    from torch.distributed.fsdp import fully_shard

    model = small()
    inputs = example(model)
    made = []

    class Noted(raster_gradients.Gathered):
        def __init__(self, *given: Any) -> None:
            made.append(True)
            super().__init__(*given)

    monkeypatch.setattr(raster, "Gathered", Noted)
    mesh = torch.distributed.init_device_mesh(DEVICE, (1,))
    for block in model.blocks if by_block else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def run() -> list[Tensor | None]:
        return [gradient.full_tensor() for gradient in gradients_of(model, inputs) if gradient is not None]

    expected = run()
    monkeypatch.setattr(raster_gradients, "gathers", lambda: True)
    found = run()
    assert made == ([] if by_block else [True])
    assert same(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_a_pass_that_reaches_no_parameter_joins_at_its_end(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tokens alone, say: the nodes in which parameters' gradients meet are not gone back through."""
    model = small()
    x, t, y = example(model, 2)
    x.requires_grad_()
    monkeypatch.setattr(raster_gradients, "lags", lambda: way == "a block late")

    def run() -> list[Tensor]:
        return [*torch.autograd.grad(model(x, t, y).square().mean(), x)]

    (expected,) = run()
    graph, (found,) = capture(run)
    graph.replay()
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["neither", "side", "main", "ahead"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 2])
def test_in_a_graph_they_are_those_of_block_after_block(
    batch: int, way: str, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever stream is held up: also those that are read when they are handed on, as a reducer does."""
    model = small()
    inputs = example(model, batch)
    read = [torch.zeros_like(parameter) for parameter in model.parameters()]

    def keep(copy: Tensor, gradient: Tensor) -> None:
        copy.copy_(gradient)

    for parameter, copy in zip(model.parameters(), read, strict=True):
        parameter.register_post_accumulate_grad_hook(lambda parameter, copy=copy: keep(copy, parameter.grad))

    def run() -> list[Tensor]:
        return [*(gradient for gradient in gradients_of(model, inputs) if gradient is not None), *read]

    def replayed() -> list[Tensor]:
        graph, results = capture(run)
        for tensor in results:
            tensor.fill_(float("nan"))
        graph.replay()
        return [tensor.clone() for tensor in results]

    with monkeypatch.context() as plain:
        plain.setattr(raster_gradients, "gathers", lambda: False)
        expected = replayed()
    monkeypatch.setattr(raster_gradients, "lags", lambda: way == "a block late")
    forks = hold_up(late, monkeypatch)
    found = replayed()
    assert len(forks) > SMALL.depth
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)
