"""What DiG as a module does not take on its kernels: one line names it, before a kernel reads anything."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dig.model import DiG
from tests.helpers import example, relative_error
from tests.ops.modules import CONFIG, DEVICE, _whole_fp32, model_of, twin_of  # noqa: F401 - a fixture is among them


def test_what_does_not_fit_together_is_refused_before_a_kernel_reads_it() -> None:
    model = model_of(replace(CONFIG, depth=1))
    x, t, y = example(model, 4)
    for arguments in ((x, t[:1], y[:1]), (x[:1], t, y)):
        with torch.no_grad(), pytest.raises(ValueError, match="t and y must have x's"):
            model(*arguments)
    tokens, c, route = torch.randn(2, 6, 64, device=DEVICE), torch.randn(2, 64, device=DEVICE), model.routes[0]
    for arguments in ((tokens, c[:1], route), (tokens[:1], c, route), (tokens[:, :5], c, route)):
        with pytest.raises(ValueError, match="a block takes tokens"):
            model.blocks[0](*arguments)
    with pytest.raises(ValueError, match="not in float16"):
        model.blocks[0](tokens.half(), c.half(), route)
    with pytest.raises(ValueError, match="not in float16"):
        copy.deepcopy(model).half()(x, t, y)


def test_forward_mode_is_refused_and_never_drops_a_tangent() -> None:
    model = model_of(replace(CONFIG, depth=1))
    x, t, y = example(model, 1)
    with torch.no_grad(), pytest.raises(ValueError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: model(x, t, y), (x,), (torch.randn_like(x),))


def _penalty(model: DiG, x: Tensor, t: Tensor, y: Tensor) -> None:
    """The norm of a gradient, differentiated."""
    x = x.requires_grad_()
    torch.autograd.grad(model(x, t, y).sum(), x, create_graph=True)[0].square().sum().backward()


def _penalty_of_weights(model: DiG, x: Tensor, t: Tensor, y: Tensor) -> None:
    """Of a block's modulation, which its fused pass computes without a gradient: this one would come out too small."""
    linear = model.blocks[0].adaLN_modulation[1]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is linear.weight or parameter is linear.bias)
    (gradient,) = torch.autograd.grad(model(x, t, y).sum(), linear.weight, create_graph=True)
    gradient.square().sum().backward()


TRANSFORMS = {
    "second derivatives": _penalty,
    "second derivatives, which create_graph=True asks for": _penalty_of_weights,
    "derivatives by torch.func": lambda model, x, t, y: torch.func.grad(lambda x: model(x, t, y).sum())(x),
    "rule for torch.func.vmap": lambda model, *inputs: torch.func.vmap(
        lambda *one: model(*(value[None] for value in one))
    )(*inputs),
}


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("what", TRANSFORMS)
def test_derivatives_that_the_kernels_do_not_have_are_refused_in_one_line(what: str, touched: bool) -> None:
    model = model_of(replace(CONFIG, depth=1))
    if touched:
        model.blocks[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=rf"^backend 'triton' has no {what}.*; take backend 'reference' for them$"):
        TRANSFORMS[what](model, *example(model))
    TRANSFORMS[what](twin_of(model), *example(model))


def test_a_block_alone_refuses_them_too() -> None:
    block, (route, *_) = (model := model_of(replace(CONFIG, depth=1))).blocks[0], model.routes
    tokens, c = torch.randn(2, 6, 64, device=DEVICE), torch.randn(2, 64, device=DEVICE)
    for transform, what in ((torch.func.grad, "derivatives by torch.func"), (torch.func.vmap, "rule for torch.func")):
        with pytest.raises(ValueError, match=f"has no {what}"):
            transform(lambda x: block(x, c, route).sum())(tokens)
    with pytest.raises(ValueError, match="has no forward-mode derivatives"):
        torch.func.jvp(lambda x: block(x, c, route), (tokens,), (tokens,))
    output = block(tokens.requires_grad_(), c, route)
    with pytest.raises(ValueError, match="has no second derivatives"):
        torch.autograd.grad(output.sum(), tokens, create_graph=True)


CHANGES = {
    "(2, 6, 64) in float16": lambda tokens: tokens.half(),
    "(2, 6, 64) in float64": lambda tokens: tokens.double(),
    "(2, 6, 64) in int32": lambda tokens: tokens.int(),
    "(2, 3, 64) in float32": lambda tokens: tokens[:, :3],
    "(1, 6, 64) in float32": lambda tokens: tokens[:1],
    "tuple": lambda tokens: (tokens,),
}


@pytest.mark.parametrize("handed", CHANGES)
def test_a_block_that_hands_on_no_tokens_is_named(handed: str) -> None:
    """Also the last one: of half of the tokens an image of half of the channels would come out."""
    block = 0 if handed == "tuple" else 1
    for model in ((own := model_of()), twin_of(own)):
        model.blocks[block].register_forward_hook(lambda module, arguments, output: CHANGES[handed](output))
        kernels = model is own
        if handed == "(2, 6, 64) in float16" and not kernels:
            assert torch.isfinite(model(*example(model))).all()  # The reference promotes it.
            continue
        takes = "float32 or bfloat16" if kernels else "float32"
        expected = f"blocks.{block} (or a hook on it) handed on {handed}; the model takes tokens (2, 6, 64) in {takes}"
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            model(*example(model))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_may_hand_on_tokens_in_the_other_of_the_kernels_dtypes(batch: int) -> None:
    model = model_of()
    inputs = example(model, batch)
    with torch.set_grad_enabled(batch > 1):
        expected = model(*inputs)
        for block in model.blocks:
            block.register_forward_hook(lambda module, arguments, output: output.bfloat16())
        assert 0 < relative_error(model(*inputs), expected) < 2e-2


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_another_number_of_blocks_is_refused_in_one_line(backend: str, blocks: int) -> None:
    model = model_of() if backend == "triton" else twin_of(model_of())
    model.blocks = nn.ModuleList([*model.blocks, *model.blocks])[:blocks]
    with torch.no_grad(), pytest.raises(ValueError, match=rf"^the model has {blocks} blocks, and was built for 2, .*"):
        model(*example(model))
