"""Gradients that are written where they are sent from are those that are copied there."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dig import raster_gradients, raster_operations
from dig.gradient_places import Places
from dig.model import DiG
from dig.ops.linear import as_rows, weight_gradient
from dig.ops.modulation import modulation_backward, modulation_gradients
from dig.training.parallel.copying import CopyAllReduce
from tests.dig.test_copying import windows
from tests.helpers import example
from tests.ops.test_raster_gradients import DEVICE, same, take
from tests.ops.test_side_stream import small

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="on GPUs ranks lend: tests/dig/test_copying_gpu.py")
LARGE = (
    "attn.in_proj.weight", "mlp.gate_proj.weight", "attn.o_proj.weight", "mlp.down_proj.weight",
    "adaLN_modulation.1.weight",
)  # fmt: skip


@pytest.fixture(autouse=True)
def late(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one, and blocks that hand on their gradients late, as in a graph."""
    take("a block late", monkeypatch)


class Watch:
    """What is lent and taken, in turn.

    Attributes:
        taken: Of each place that was taken, its parameter and a tensor of its own over the memory.
        kept: Where each parameter's gradient was when autograd had accumulated it, before anybody else saw it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[tuple[Tensor, int]] = []
        self.kept: dict[int, int] = {}
        real = Places.take

        def noted(places: Places, parameter: Tensor, accumulator: Any) -> Tensor | None:
            place = real(places, parameter, accumulator)
            if place is not None:
                self.taken.append((parameter, place.data_ptr()))
                place.fill_(float("nan"))
            return place

        monkeypatch.setattr(Places, "take", noted)

    def keep(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self.kept.update({id(p): p.grad.data_ptr()}))


def wrapped(model: nn.Module, **given: Any) -> tuple[DistributedDataParallel, CopyAllReduce]:
    """In buckets of which one has several parameters, and some have one."""
    network = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=0.1, **given)
    return network, CopyAllReduce(network, windows())


def go_back(network: Callable[..., Any], inputs: tuple[Tensor, ...], scale: float = 1.0) -> None:
    (scale * network(*inputs)).square().mean().backward()


def large(model: DiG) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return {f"blocks.{i}.{name}": named[f"blocks.{i}.{name}"] for i in range(len(model.blocks)) for name in LARGE}


def test_they_are_written_where_they_are_sent_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backward pass: autograd keeps the memory, so there is nothing for DistributedDataParallel to copy."""
    model = small()
    inputs = example(model)
    watch = Watch(monkeypatch)
    network, hook = wrapped(model)
    in_buckets: dict[int, int] = {}
    average = hook.average

    def noted(bucket: Any) -> Any:
        in_buckets.update((id(p), g.data_ptr()) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True))
        return average(bucket)

    monkeypatch.setattr(hook, "average", noted)
    watch.keep(model)
    for turn in range(4):
        network.zero_grad()
        watch.taken.clear()
        go_back(network, inputs)
        # The first pass' buckets go, and are lent to nobody; those that are laid then are lent as they are sent.
        assert len(watch.taken) == (0 if turn < 2 else len(large(model)))
    assert len(set(in_buckets.values())) == len(list(model.parameters()))
    for parameter, at in watch.taken:
        assert at == in_buckets[id(parameter)] == watch.kept[id(parameter)] == parameter.grad.data_ptr()
    assert {id(parameter) for parameter, _ in watch.taken} == {id(parameter) for parameter in large(model).values()}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class Outside(nn.Module):
    """A model one of whose weights is used outside of its block too, before it and after."""

    def __init__(self, model: DiG) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        weight = self.model.blocks[1].attn.o_proj.weight
        return self.model(inputs[0] * weight.mean(), *inputs[1:]) + weight.square().sum()


Results = list[Tensor | None]


def gradients(model: nn.Module) -> Results:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def plain(model: DiG, inputs: tuple[Tensor, ...], network: Any) -> Results:
    network.zero_grad()
    go_back(network, inputs, 2)
    return gradients(model)


def in_parts(model: DiG, inputs: tuple[Tensor, ...], network: Any) -> Results:
    """The first part's is written there, and the others' are added to it."""
    network.zero_grad()
    with network.no_sync():
        go_back(network, inputs)
        go_back(network, inputs, 3)
    go_back(network, inputs, 2)
    return gradients(model)


def zeroed(model: DiG, inputs: tuple[Tensor, ...], network: Any) -> Results:
    network.zero_grad(set_to_none=False)
    go_back(network, inputs, 2)
    return gradients(model)


def clipped(model: DiG, inputs: tuple[Tensor, ...], network: Any) -> Results:
    network.zero_grad()
    go_back(network, inputs)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    return [norm, *gradients(model)]


def two_forward_passes(model: DiG, inputs: tuple[Tensor, ...], network: Any) -> Results:
    """Of one backward pass, in which autograd adds what each of them gives."""
    network.zero_grad()
    with network.no_sync():
        (network(*inputs).square().mean() + network(2 * inputs[0], *inputs[1:]).square().mean()).backward()
    return gradients(model)


def handed_out(model: DiG, inputs: tuple[Tensor, ...], network: Any) -> Results:
    """By torch.autograd.grad, twice: what is handed out first stays what it was."""
    network.zero_grad()
    found: list[Tensor | None] = []
    with network.no_sync():
        for scale in (1, 2):
            found += torch.autograd.grad((scale * network(*inputs)).square().mean(), [*large(model).values()])
    return found


def of_some(model: DiG, inputs: tuple[Tensor, ...], network: Any) -> Results:
    """A pass for one block's leaves the others' alone, which somebody may hold."""
    network.zero_grad()
    with network.no_sync():
        go_back(network, inputs)
        held = [parameter.grad for parameter in model.blocks[2].parameters()]
        network.zero_grad()
        network(*inputs).square().mean().backward(inputs=[*model.blocks[1].parameters()])
    return [*gradients(model), *held]


def beside_the_network(model: DiG, inputs: tuple[Tensor, ...], network: Any) -> Results:
    """Passes of the model itself are nobody's to send: what they leave stays what it was."""
    network.zero_grad()
    go_back(model, inputs)
    held = [parameter.grad for parameter in model.parameters()]
    network.zero_grad()
    go_back(network, inputs, 2)
    return [*held, *gradients(model)]


def as_is(model: DiG) -> nn.Module:
    return model


def frozen(model: DiG) -> nn.Module:
    model.blocks[1].mlp.down_proj.weight.requires_grad_(False)
    model.blocks[0].attn.in_proj.weight.requires_grad_(False)
    return model


def shared(model: DiG) -> nn.Module:
    model.blocks[2].attn.o_proj.weight = model.blocks[0].attn.o_proj.weight
    return model


def hooked(model: DiG) -> nn.Module:
    """By one that gives another tensor, and one that keeps what it is shown."""
    model.blocks[1].attn.in_proj.weight.register_hook(lambda gradient: 2 * gradient)
    kept = model.blocks[1].mlp.gate_proj.weight
    shown: list[Tensor] = []
    kept.register_hook(shown.append)
    model.shown = shown
    return model


def unused(model: DiG) -> nn.Module:
    model.unused = nn.Parameter(torch.zeros(3))
    return model


def slowly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("made", "step", "least"),
    [
        (as_is, plain, 15), (as_is, in_parts, 15), (as_is, zeroed, 0), (as_is, clipped, 15),
        (as_is, two_forward_passes, 15), (as_is, handed_out, 0), (as_is, of_some, 20), (as_is, beside_the_network, 15),
        (frozen, plain, 13), slowly(frozen, in_parts, 13), (shared, plain, 14), (shared, in_parts, 14),
        (hooked, plain, 13), slowly(hooked, in_parts, 13), (Outside, plain, 15), slowly(Outside, in_parts, 15),
        (unused, plain, 0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_they_are_those_that_are_copied(
    made: Callable[[DiG], nn.Module],
    step: Callable[..., Results],
    least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, and as many places are taken in a step as there are to take."""
    watch = Watch(monkeypatch)

    def run(*, passes_before: int) -> Results:
        torch.manual_seed(0)
        model = small()
        whole = made(model)
        inputs = example(model)
        network, _ = wrapped(whole, find_unused_parameters=made is unused)
        for _ in range(passes_before):
            network.zero_grad()
            go_back(network, inputs)
        watch.taken.clear()
        getattr(model, "shown", []).clear()
        found = step(model, inputs, network)
        return [*found, *(gradient for gradient in getattr(model, "shown", ()))]

    with monkeypatch.context() as without:
        without.setattr(raster_gradients, "places_here", lambda: None)
        due = run(passes_before=0)
    assert not watch.taken
    # Places are lent in the second pass.
    found = run(passes_before=2)
    assert len(watch.taken) == least
    assert len(found) == len(due)
    assert same(found, due)


def test_they_go_with_their_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network that is gone nothing is held, and of one that lays its buckets anew nothing that was before."""
    model = small()
    inputs = example(model)
    watch = Watch(monkeypatch)
    network, hook = wrapped(model)
    for _ in range(3):
        network.zero_grad()
        go_back(network, inputs)
    assert len(hook.places) > len(watch.taken) == 15
    network.zero_grad()
    # As if a rebuild had moved them: the first that is sent from elsewhere ends all places of before.
    hook._lent = dict.fromkeys(hook._lent, 1)
    views, was = hook.places, [*hook.places._places.values()]
    go_back(network, inputs)
    assert not {id(place) for place in was} & {id(place) for place in views._places.values()}
    places = [place.view for place in views._places.values()]
    del network, hook, views, was
    gc.collect()
    watch.taken.clear()
    model.zero_grad()
    again, _ = wrapped(model)
    go_back(again, inputs)
    go_back(model, inputs)
    assert not watch.taken
    del places


def test_what_is_not_lent() -> None:
    bucket = torch.zeros(64)
    parameter = nn.Parameter(torch.zeros(2, 4))
    places = Places()
    for view, fits in (
        (bucket[:8].view(2, 4), True), (bucket[1:9].view(2, 4), False), (bucket[:8].view(4, 2), False),
        (bucket[:16].view(2, 8)[:, ::2], False), (bucket[:8].view(2, 4).double(), False),
        (bucket[4:12].view(2, 4), True),
    ):  # fmt: skip
        places.lend([parameter], [view])
        assert len(places) == fits
    places.clear()
    assert not len(places)
    places.lend([parameter], [bucket[:8].view(2, 4)])
    del parameter
    gc.collect()
    assert not len(places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_written_where_they_are_wanted(dtype: torch.dtype) -> None:
    dy, x = torch.randn(64, 24).to(dtype), torch.randn(64, 40).to(dtype)
    place = torch.full((24, 40), float("nan"))
    assert weight_gradient(dy, x, torch.float32, place) is place
    assert torch.equal(place, weight_gradient(dy, x))
    weight, place = torch.randn(24, 40), torch.full((24, 40), float("nan"))
    dout, c = torch.randn(3, 24), torch.randn(3, 40).to(dtype)
    found = modulation_gradients(dout, c, weight, place)
    assert found[1] is place
    assert same([*found], [*modulation_backward(dout, c, weight)])


def test_one_launch_writes_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight's in its own, where they are computed together."""

    def together(pairs: Any, places: Any) -> list[Tensor]:
        return [
            weight_gradient(as_rows(dy), as_rows(x), torch.float32, place)
            for (dy, x), place in zip(pairs, places, strict=True)
        ]

    monkeypatch.setattr(raster_operations, "groups_gradients", lambda x, weights: True)
    monkeypatch.setattr(raster_operations, "weight_gradients", together)
    watch = Watch(monkeypatch)
    model = small()
    inputs = example(model)
    network, _ = wrapped(model)
    watch.keep(model)
    found = []
    for _ in range(3):
        network.zero_grad()
        go_back(network, inputs)
        found.append(gradients(model))
    assert len(watch.taken) == 15
    assert all(watch.kept[id(parameter)] == at for parameter, at in watch.taken)
    assert same(found[2], found[0])


@pytest.mark.parametrize("images", [1, 2])
def test_one_image_takes_none(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    model = small()
    inputs = example(model, images)
    network, _ = wrapped(model)
    for _ in range(3):
        network.zero_grad()
        go_back(network, inputs)
    assert len(watch.taken) == (0 if images == 1 else 15)
