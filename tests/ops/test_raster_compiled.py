"""A block's passes as torch.compile takes them: one operation each, with the numbers of the passes as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from bench.cases.case import Case
from bench.parity.inputs import fill_zeros
from bench.parity.operation import check_operation
from dig import raster, raster_compiled
from dig.block import DiGBlock
from dig.model import DiG
from dig.ops.tiles import passes_for
from dig.raster_inference import infer_block, infer_images
from dig.raster_training import backward_pass, forward_pass
from dig.raster_weights import BlockWeights, Settings, prepare_block, settings_of
from dig.scan import RASTER, Route, ScanOrder
from dig.spec import create_model
from tests.helpers import example, relative_error
from tests.ops.test_raster import BASE, DEVICE, twins

CASES = {
    "paper": BASE,
    "release": replace(BASE, variant="release"),
    "no convolution": replace(BASE, convolution="none"),
    "skips": replace(BASE, skip="linear", variant="release"),
}


@contextmanager
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Within, the fused pass goes the way that it goes under torch.compile, which nothing traces; what it called."""
    called: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for name in ("train", "go_back", "infer"):
            patch.setattr(raster_compiled, name, noting(getattr(raster_compiled, name), name, called))
        yield called


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("mode", [pytest.param("train", marks=pytest.mark.slow), "forward"])
def test_the_mixer_alone_compiles_as_the_benchmark_checks_it(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.parity.compiling.BACKEND", "aot_eager")
    options = (("backend", "triton"),)
    case = Case(model="DiG-S/8", options=options, resolution=128, mode=mode, execution="compile", device=DEVICE)
    model = create_model(case.model, image_size=128, backend="triton").to(DEVICE)
    fill_zeros(model)
    assert check_operation(case, model) is not None


def noting(run: Callable[..., Any], name: str, called: list[str]) -> Callable[..., Any]:
    def noted(*given: Any, **named: Any) -> Any:
        called.append(name)
        return run(*given, **named)

    return noted


def results(kernels: DiG, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and every gradient that is asked for."""
    kernels.zero_grad()
    output = kernels(*inputs)
    (output.float() * torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)).sum().backward()
    return [output.detach(), *(p.grad.clone() for p in kernels.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("name", "batch", "autocast"),
    [
        ("paper", 1, False),
        ("release", 1, True),
        ("release", 2, True),
        ("no convolution", 2, False),
        ("skips", 1, False),
        *(pytest.param(name, 1 + i % 2, True, marks=pytest.mark.slow) for i, name in enumerate(CASES) if i != 1),
    ],
)
def test_the_same_numbers(name: str, batch: int, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of training, where what precedes and follows the blocks may add up otherwise, and the same bits without."""
    _, kernels = twins(replace(CASES[name], depth=4 if name == "skips" else 2))
    inputs = example(kernels, batch)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        expected = results(kernels, inputs)
        with compiling(monkeypatch) as called:
            found = results(kernels, inputs)
        assert called == ["train"] * len(kernels.blocks) + ["go_back"] * len(kernels.blocks)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        with torch.no_grad():
            plain, before = kernels(*inputs), inputs[0].clone()
            with compiling(monkeypatch) as called:
                assert torch.equal(kernels(*inputs), plain)
            assert called == ["infer"] * len(kernels.blocks)
            assert torch.equal(inputs[0], before)


def of_a_block(batch: int) -> tuple[Tensor, Tensor, BlockWeights, Settings]:
    """Tokens, condition, weights and settings."""
    _, kernels = twins(replace(BASE, depth=1))
    (block,) = kernels.blocks
    assert isinstance(block, DiGBlock)
    weights = block.weights()
    assert weights is not None
    detached = BlockWeights._make(None if w is None else w.detach() for w in weights)
    settings = settings_of("rms", 1, kernels.grid, ScanOrder(transposed=True, reversed=True))
    tokens = torch.randn(batch, kernels.grid[0] * kernels.grid[1], 64, device=DEVICE)
    return tokens, torch.randn(batch, 64, device=DEVICE), detached, settings


def kept_by(x: Tensor, c: Tensor, w: BlockWeights, s: Settings) -> list[Tensor | None]:
    prepared = prepare_block(w, c, x.dtype, fold_gates=False)
    _, kept = forward_pass(x, c, prepared.modulation, prepared.products, w, s)
    return [*kept, *w]


FROZEN = {
    "all are asked for": (),
    "products are frozen": ("in_proj", "gate_proj", "o_proj", "down_proj"),
    "no modulation": ("adaln_weight", "adaln_bias", "conv_weight"),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("which", FROZEN)
def test_gradients_that_are_asked_for_are_those_of_the_pass(which: str, batch: int) -> None:
    x, c, w, s = of_a_block(batch)
    dout = torch.randn_like(x)
    needed: Any = BlockWeights._make(name not in FROZEN[which] for name in BlockWeights._fields)
    condition = which == "all are asked for"
    saved = kept_by(x, c, w, s)
    with torch.no_grad():
        expected = backward_pass(lambda: saved, dout, s, needed, condition=condition, part=None)
    dx, dc, gradients = raster_compiled.go_back(
        saved, dout, *raster_compiled._numbers(s), list(needed), condition=condition
    )
    assert torch.equal(dx, expected[0])
    assert torch.equal(dc, expected[1]) if condition else dc is None
    for ours, theirs, asked in zip(gradients, expected[2], needed, strict=True):
        assert torch.equal(ours, theirs) if asked else ours is None


def calls(batch: int) -> dict[str, tuple[tuple[Any, ...], Callable[[], object]]]:
    """Arguments of each operation, and what it stands for."""
    x, c, w, s = of_a_block(batch)
    numbers = raster_compiled._numbers(s)
    saved = kept_by(x, c, w, s)
    frozen: Any = BlockWeights._make(name != "gate_proj" for name in BlockWeights._fields)

    def infer() -> Tensor:
        prepared = prepare_block(w, c, x.dtype, fold_gates=batch == 1)
        return infer_block(x, prepared, w, s) if batch == 1 else infer_images(x, prepared, w, s)

    return {
        "train_block": ((x, c, list(w), *numbers), lambda: kept_by(x, c, w, s)),
        "train_block_backward": (
            (x, saved, list(frozen), False, *numbers),
            lambda: backward_pass(lambda: saved, x, s, frozen, condition=False, part=None),
        ),
        "infer_block": ((x, c, list(w), batch == 1, *numbers), infer),
    }


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["train_block", "train_block_backward", "infer_block"])
def test_operations_are_registered_soundly(name: str, batch: int) -> None:
    """Nothing is changed or aliased, and what stands for tensors without values has their shapes and strides."""
    arguments, _ = calls(batch)[name]
    torch.library.opcheck(getattr(torch.ops.dig, name), arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["train_block", "train_block_backward", "infer_block"])
def test_they_count_what_is_in_them(name: str, batch: int) -> None:
    arguments, inside = calls(batch)[name]
    assert raster is not None  # which registers the formulas
    totals = []
    for run in (lambda: getattr(torch.ops.dig, name)(*arguments), inside):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_a_fused_block_that_is_told_to_compile_is_left_as_it_is() -> None:
    """One whose parts somebody has to see called is compiled, as is every one of the reference."""
    reference, kernels = twins(replace(BASE, depth=2))
    kernels.blocks[1].attn.o_proj.register_forward_hook(lambda *_: None)
    for model in (reference, kernels):
        for block in model.blocks:
            block.compile(backend="eager")
    compiled = [block._compiled_call_impl is not None for block in (*reference.blocks, *kernels.blocks)]
    assert compiled == [True, True, False, True]


@pytest.mark.slow
def test_batches_that_grow_are_compiled_once_more() -> None:
    """The second size makes the batch a symbol; no other compiles anything, on either side of the condition's bound."""
    _, kernels = twins(replace(BASE, depth=1))
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5, passes_for(torch.device(DEVICE)).condition_images + 1):
        inputs = example(kernels, batch)
        with torch.compiler.set_stance("fail_on_recompile" if batch > 3 else "default"):
            found = results(compiled, inputs)
        for ours, theirs in zip(found, results(kernels, inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backend", "autocast"), [("reference", True), ("triton", False), ("triton", True)])
def test_a_model_is_one_graph(backend: str, autocast: bool) -> None:
    """With gradients, whose nodes PyTorch 2.11's compiler hands strings and numbers alone."""
    reference, kernels = twins(replace(BASE, depth=1))
    model = kernels if backend == "triton" else reference
    inputs = example(model, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        for ours, theirs in zip(results(compiled, inputs), results(model, inputs), strict=True):
            assert relative_error(ours, theirs) < (1e-2 if autocast else 1e-4)


@pytest.mark.parametrize("name", ["train_block", "infer_block"])
def test_an_operation_by_itself_loses_no_derivative(name: str) -> None:
    """As a program that something else traced of a model may call it."""
    (x, *others), _ = calls(2)[name]
    run = getattr(torch.ops.dig, name)
    with torch.no_grad():
        run(x.detach().requires_grad_(), *others)
    run(x, *others)
    with pytest.raises(ValueError, match=rf"^torch\.ops\.dig\.{name} has no gradient by itself: .*"):
        run(x.detach().requires_grad_(), *others)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(ValueError, match="no forward-mode derivatives"):
        run(forward_ad.make_dual(x, torch.ones_like(x)), *others)
    with torch.no_grad(), forward_ad.dual_level():
        run(x, *others)


def _jvp(model: DiG, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        tangent: Tensor = torch.func.jvp(lambda x: model(x, t, y), (x,), (torch.ones_like(x),))[1]
    return tangent


def _penalty(model: DiG, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(model(x, t, y).sum(), x, create_graph=True)[0].square().sum()


@pytest.mark.parametrize(
    ("of", "what"), [(_jvp, "forward-mode derivatives"), (_penalty, "second derivatives, which create_graph=True .*")]
)
def test_what_the_kernels_do_not_have_is_refused_within_a_compiled_function_too(
    of: Callable[..., Tensor], what: str
) -> None:
    reference, kernels = twins(replace(BASE, depth=1))
    inputs = example(kernels, 2)
    # On a CPU: PyTorch 2.11 can't compile forward-mode derivatives of its RMSNorm on a GPU.
    given = [reference.cpu(), *(value.cpu() for value in inputs)]
    torch.testing.assert_close(torch.compile(of, backend="eager")(*given), of(*given))
    with pytest.raises(ValueError, match=rf"^backend 'triton' has no {what}; take backend 'reference' for them$"):
        torch.compile(of, backend="eager")(kernels, *inputs).backward()


def test_a_compiled_model_is_refused_where_forward_mode_is_entered_later() -> None:
    _, kernels = twins(replace(BASE, depth=1))
    compiled, (x, t, y) = torch.compile(kernels, backend="aot_eager"), example(kernels, 2)
    with torch.no_grad():
        compiled(x, t, y)
        with forward_ad.dual_level(), pytest.raises(ValueError, match="no forward-mode derivatives"):
            compiled(forward_ad.make_dual(x, torch.ones_like(x)), t, y)


def test_a_program_is_exported_without_gradients_alone() -> None:
    _, kernels = twins(replace(BASE, depth=1))
    inputs = example(kernels, 2)
    with pytest.raises(Exception, match=r"torch\.export would lose gradients of backend 'triton': export under"):
        torch.export.export(kernels, inputs, strict=True)
    with torch.no_grad():
        program = torch.export.export(kernels, inputs, strict=True).module()
        assert relative_error(program(*inputs), kernels(*inputs)) < 1e-5
    with pytest.raises(ValueError, match="no gradient by itself"):
        program(*inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_change_before_the_backward_pass_are_noticed(compiled: bool) -> None:
    _, kernels = twins(replace(BASE, depth=1))
    run = torch.compile(kernels, backend="aot_eager") if compiled else kernels
    for name in ("attn.in_proj", "mlp.down_proj", "adaLN_modulation.1"):
        output = run(*example(kernels, 2))
        with torch.no_grad():
            kernels.blocks[0].get_submodule(name).weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_by_itself_takes_what_autocast_gives(compiled: bool) -> None:
    """Tokens in fp32, as the reference takes them: its products are in bf16, and what it hands on in fp32."""
    reference, kernels = twins(replace(BASE, depth=1))
    route = Route(grid=kernels.grid, source=RASTER, order=kernels.orders[0], target=RASTER)
    tokens = torch.randn(2, kernels.grid[0] * kernels.grid[1], 64, device=DEVICE)
    condition = torch.randn(2, 64, device=DEVICE)
    block = torch.compile(kernels.blocks[0], backend="aot_eager") if compiled else kernels.blocks[0]
    whole = reference.blocks[0](tokens, condition, route)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = block(tokens, condition, route)
    assert found.dtype == torch.float32
    assert 1e-4 < relative_error(found, whole) < 2e-2
    found.sum().backward()
    whole.sum().backward()
    ours, theirs = (model.blocks[0].mlp.down_proj.weight.grad for model in (kernels, reference))
    assert relative_error(ours, theirs) < 3e-2
