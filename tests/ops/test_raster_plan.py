"""A training block's plan: the launches of the operations one by one, in their order, and the same bits."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dig import raster_block, raster_operations, raster_plan
from dig.model import DiG, DiGConfig
from dig.ops.adaln import fused as adaln
from dig.ops.gla import launches
from dig.ops.gla.kernels_walk import segment_state_kernel, walk_kernel
from dig.ops.launch import LaunchContext
from dig.ops.placed import moved, placed, whole
from dig.ops.tiles import INTERPRETER, for_device, forget_choices
from dig.raster_plan import BlockPlan
from tests.helpers import example, randomize
from tests.ops.test_launch import _Kernel, started
from tests.ops.test_raster import BASE, DEVICE, _Calls

pytestmark = pytest.mark.usefixtures("poison")
SMALL = replace(BASE, depth=2, backend="triton", variant="release")
CASES = {
    "release": SMALL,
    "paper": replace(SMALL, variant="paper"),
    "no convolution": replace(SMALL, convolution="none", depth=1),
}
Found = dict[str, Tensor]


def built(config: DiGConfig = SMALL) -> DiG:
    torch.manual_seed(0)
    return randomize(DiG(config)).eval().to(DEVICE)


def gradients(model: DiG, batch: int = 1, *, autocast: bool = True, back: Any = None) -> Found:
    """The output's and every parameter's; ``back`` is entered before the backward pass."""
    torch.manual_seed(1)
    inputs = example(model, batch)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        output = model(*inputs)
    weight = torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)
    loss = (output.float() * weight).sum()
    if back is None:
        loss.backward()
    else:
        with back:
            loss.backward()
    return {"output": output.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(found: Found, due: Found) -> bool:
    return found.keys() == due.keys() and all(torch.equal(found[name], due[name]) for name in due)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BlockPlan | None]:
    """The plans that passes got."""
    found: list[BlockPlan | None] = []
    plan_for = raster_operations.plan_for

    def noting(*arguments: Any, **named: Any) -> BlockPlan | None:
        found.append(plan_for(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(raster_operations, "plan_for", noting)
    return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was started: kernels, grids, numbers, and the dtypes of what they were given."""
    found: list[tuple[Any, ...]] = []
    start = LaunchContext.start

    def noting(self: LaunchContext, launch: Any, *tensors: Any) -> None:
        given = launch.given(tensors)
        kinds = [tuple(t.dtype for t in each) if isinstance(each, tuple) else each.dtype for each in given]
        found.append((launch.kernel, launch.grid, launch.numbers, launch.constants, kinds))
        start(self, launch, *tensors)

    monkeypatch.setattr(LaunchContext, "start", noting)
    return found


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_launches_what_operations_do_one_by_one(
    name: str, batch: int, asked: list[Any], launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in the same order, of the same dtypes."""
    autocast = name != "paper"
    found = gradients(built(CASES[name]), batch, autocast=autocast)
    assert asked
    assert None not in asked
    by_plan = launched[:]
    launched.clear()
    monkeypatch.setattr(raster_operations, "plan_for", lambda *arguments, **named: None)
    assert same(found, gradients(built(CASES[name]), batch, autocast=autocast))
    assert by_plan == launched
    assert len(launched) > 20


@pytest.mark.parametrize("walks", [True, False])
def test_a_plan_walks_as_operations_do(
    walks: bool, asked: list[Any], launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole heads, and segments of them."""
    config = replace(SMALL, input_size=(12, 20))  # 60 tokens: 4 chunks.
    tiles = launches.tiles_for
    walking = {"walk_chunks": 100, "walk_programs": 0}
    segments = {"walk_chunks": 0, "segment_chunks": 2, "segment_programs": 1}
    choice: dict[str, Any] = {"chunk": 16} | (walking if walks else segments)
    monkeypatch.setattr(launches, "tiles_for", lambda q, v: replace(tiles(q, v), **choice))
    found, kernels = gradients(built(config)), [each[0] for each in launched]
    assert None not in asked
    assert kernels.count(walk_kernel) == SMALL.depth
    assert kernels.count(segment_state_kernel) == (0 if walks else SMALL.depth)
    by_plan = launched[:]
    launched.clear()
    monkeypatch.setattr(raster_operations, "plan_for", lambda *arguments, **named: None)
    assert same(found, gradients(built(config)))
    assert by_plan == launched


def test_blocks_of_a_shape_share_plans_and_other_shapes_have_others(asked: list[Any]) -> None:
    """A block and its backward pass have one; every second block of a scan walks in another order."""
    model = built(replace(SMALL, depth=4))
    gradients(model)
    assert len(asked) == 8
    forward, backward = asked[:4], asked[4:]
    assert backward == forward[::-1]
    orders = [block.settings.order for block in forward]
    assert len(set(map(id, forward))) == len(set(orders))
    asked.clear()
    gradients(model)
    assert asked == [*forward, *backward]
    asked.clear()
    gradients(model, 2)
    gradients(model, autocast=False)
    model.blocks[0].attn.in_proj.weight.data = model.blocks[0].attn.in_proj.weight.data.bfloat16()
    gradients(model)
    assert asked[16] is not forward[0]
    assert asked[17] is forward[1]
    assert not {id(plan) for plan in asked[:17]} & {id(plan) for plan in forward}


def test_a_plan_is_forgotten_with_the_choices_that_it_follows_from(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(replace(SMALL, depth=1))
    gradients(model)
    tiles = adaln.tiles_for
    monkeypatch.setattr(adaln, "tiles_for", lambda x: replace(tiles(x), rows=1))
    gradients(model)
    monkeypatch.undo()
    assert asked[0] is asked[1]
    assert asked[2] is not asked[0]
    assert asked[2].norm1.__self__._forward.grid != asked[0].norm1.__self__._forward.grid


def test_forgotten_choices_take_the_plans_along() -> None:
    gradients(built(replace(SMALL, depth=1)))
    choices = for_device(torch.device(DEVICE))
    before = choices.plans
    assert before
    if DEVICE == "cpu":
        assert choices is INTERPRETER
    forget_choices()
    assert not for_device(torch.device(DEVICE)).plans


def test_plans_are_forgotten_before_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster_plan, "MOST_PLANS", 1)
    gradients(built(SMALL))
    assert len(for_device(torch.device(DEVICE)).plans) == 1


def test_a_plan_holds_nothing_of_a_model() -> None:
    model = built(replace(SMALL, depth=1))
    found = gradients(model)
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, found
    gc.collect()
    assert for_device(torch.device(DEVICE)).plans
    assert not any(reference() is not None for reference in held)
    for plan in for_device(torch.device(DEVICE)).plans.values():
        assert not any(isinstance(value, Tensor) for value in vars(plan).values())


def test_a_weight_with_gaps_has_no_plan(asked: list[Any]) -> None:
    """Each operation then sees for itself; the modules take care of it first, so it is asked directly."""
    model = built(replace(SMALL, depth=1))
    gradients(model)
    weights = model.blocks[0].weights()
    assert weights is not None
    plan = asked[0]
    x, c = torch.randn(plan.shape, device=DEVICE), torch.randn(1, plan.width, device=DEVICE)
    m = torch.randn(1, 6 * plan.width, device=DEVICE)
    assert raster_plan.plan_for(x, c, m, weights, plan.settings) is not None
    gaps = weights._replace(o_proj=weights.o_proj.T)
    assert raster_plan.plan_for(x, c, m, gaps, plan.settings) is None
    assert raster_plan.plan_for(x, c, m, weights, plan.settings, (None, x.mT)) is None
    assert raster_plan.plan_for(x.mT, c, m, weights, plan.settings) is None
    # Of a plan that is known, a weight's dtype is asked again.
    wider = weights._replace(o_proj=weights.o_proj.double())
    assert raster_plan.plan_for(x, c, m, wider, plan.settings, known=plan) is not plan
    assert raster_plan.plan_for(x, c, m, weights, plan.settings, known=plan) is plan


def test_a_plain_tensor_in_a_parameters_place_is_found() -> None:
    """As FSDP's flat parameters leave it: among the attributes, and not among the parameters."""
    model = built(replace(SMALL, depth=1))
    linear = model.blocks[0].mlp.down_proj
    weight = linear.weight.detach().clone()
    del linear._parameters["weight"]
    linear.weight = weight
    weights = model.blocks[0].weights()
    assert weights is not None
    assert weights.down_proj is weight


def test_whoever_watches_a_backward_pass_sees_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a forward pass that had a plan: what that keeps is what operations keep."""
    due = gradients(built())
    watch = _Calls()
    found = gradients(built(), back=watch)
    names = {name for name, _ in watch.seen}
    assert {"dig.gla_mixer_backward.default", "dig.srem_backward.default"} <= names
    assert same(found, due)


def test_a_plan_is_asked_for_by_the_pass_that_gives_it_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass with its forward pass' plan asks for no tiles again."""
    model, calls = built(replace(SMALL, depth=1)), 0
    gradients(model)
    backward = raster_block.backward_pass
    for_device(torch.device(DEVICE)).plans.clear()

    def going_back(*arguments: Any, plan: BlockPlan | None, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        assert plan is not None
        for_device(torch.device(DEVICE)).plans.clear()
        found = backward(*arguments, plan=plan, **named)
        assert not for_device(torch.device(DEVICE)).plans
        return found

    monkeypatch.setattr(raster_block, "backward_pass", going_back)
    gradients(model)
    assert calls == 1


def test_places_by_name() -> None:
    first = started(_Kernel())
    found = placed(first, "a b c", "c", ("a", 8), "a")
    assert found.parts == ((2, 0), (0, 8), (0, 0))
    assert found.of_one_kind
    assert (found.kernel, found.grid, found.constants) == (first.kernel, first.grid, first.constants)
    again = moved(found, "y scratch", "y", "y", ("scratch", 64))
    assert again.parts == ((1, 64), (0, 8), (0, 0))
    assert first.parts is None
    assert not first.of_one_kind
    assert [whole(elements) for elements in (0, 1, 64, 65)] == [0, 64, 64, 128]
