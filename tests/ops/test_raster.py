"""DiG on its own kernels computes what DiG's reference does, with the same weights, whatever the scan and the grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dig import raster, raster_block, raster_inference, raster_weights
from dig.model import DiG, DiGConfig
from dig.ops.adaln import fused as adaln
from dig.ops.gla import launches
from dig.ops.srem import fused as srem
from dig.ops.swiglu import fused as swiglu
from dig.ops.swiglu import products
from dig.ops.tiles import INTERPRETER, sm90
from dig.training.step import checkpoint_blocks
from tests.helpers import example, randomize, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = DiGConfig(input_size=(6, 10), depth=4, width=64, heads=1, num_classes=3)
CASES = {
    "paper": BASE,
    "no convolution": replace(BASE, convolution="none", depth=1),
    "release, three blocks": replace(BASE, variant="release", depth=3),
    "bidirectional": replace(BASE, scan="bidirectional", depth=2),
    "causal, no convolution": replace(BASE, scan="causal", convolution="none", depth=1),
    "heads of 36": replace(BASE, width=144, heads=2, depth=1),
    "skips as released": replace(BASE, skip="linear"),
    "skips to the same place": replace(BASE, skip="identity-init", skip_order="aligned", variant="release"),
}


def twins(config: DiGConfig) -> tuple[DiG, DiG]:
    """The same weights on the reference and on the kernels."""
    reference = randomize(DiG(config)).eval()
    kernels = DiG(replace(config, backend="triton")).eval()
    kernels.load_state_dict(reference.state_dict())
    return reference.to(DEVICE), kernels.to(DEVICE)


ALSO_BATCHES = ("paper", "no convolution", "heads of 36", "skips as released")
"""Cases whose two images are looked at each time; the others' when slow tests run."""


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        *((name, 1) for name in CASES),
        *(pytest.param(name, 2, marks=() if name in ALSO_BATCHES else pytest.mark.slow) for name in CASES),
    ],
)
def test_output_and_every_gradient_in_fp32(name: str, batch: int) -> None:
    """With one image the gates act on the weights, with more on the tokens.

    The pass that overwrites its tokens gives what the one that keeps them gives, and leaves the input alone.
    """
    reference, kernels = twins(CASES[name])
    inputs = example(reference, batch)
    truth = reference.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    weight = torch.randn_like(truth)
    (truth * weight).sum().backward()
    actual = kernels(*inputs)
    (actual * weight.float()).sum().backward()
    assert relative_error(actual, truth) < 1e-4
    expected = dict(reference.named_parameters())
    errors = {n: relative_error(p.grad, expected[n].grad) for n, p in kernels.named_parameters()}
    assert max(errors.values()) < 2e-3, errors
    before = inputs[0].clone()
    with torch.no_grad():
        output = kernels(*inputs)
    # Gates multiply weights in one and tokens in the other, so roundings differ.
    assert relative_error(output, actual) < 1e-5
    assert torch.equal(inputs[0], before)


@pytest.mark.parametrize("name", ["release", "paper"])
def test_gates_of_one_image_are_folded_or_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside few tokens nothing is copied, and all modulations come at once; the result is the same."""
    reference, kernels = twins(replace(BASE, depth=3, variant=name))
    inputs = example(reference, 1)
    launched: dict[int, list[str]] = {}
    for most in (0, 1000):
        passes = replace(sm90.PASSES, unfolded_tokens=most, unfolded_width=0)
        monkeypatch.setattr(raster_block, "passes_for", lambda device, passes=passes: passes)
        with torch.no_grad(), _Calls() as calls:
            output = kernels(*inputs)
            assert relative_error(output, reference(*inputs)) < 1e-5
        launched[most] = [name.split(".")[1] for name, _ in calls.seen if name.startswith("dig.")]
    assert launched[0].count("prepare_weights") == 3
    assert "prepare_weights" not in launched[1000]
    # In order one launch computes all in any case. The output head's own is another.
    assert [launched[most].count("matrix_vectors") for most in launched] == [2, 2]


def test_few_programs_prepare_weights_beside_few_tokens() -> None:
    passes = replace(sm90.PASSES, beside_tokens=10, beside_programs=3, beside_programs_gates=5)
    asked = [(10, True), (10, False), (11, True), (11, False)]
    assert [raster.programs_beside(passes, tokens, casts=casts) for tokens, casts in asked] == [3, 5, None, None]


def test_weights_of_another_dtype_are_cast_and_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster_block, "passes_for", lambda device: replace(sm90.PASSES, unfolded_width=0))
    _, kernels = twins(replace(BASE, depth=2))
    inputs = example(kernels, 1)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16), _Calls() as calls:
        kernels(*inputs)
    assert sum(name == "dig.prepare_weights.default" for name, _ in calls.seen) == 2


def gradients_of(model: DiG, output: Tensor, weight: Tensor) -> Tensor:
    """Every parameter's, end to end."""
    (output.float() * weight).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters()]
    model.zero_grad()
    return torch.cat(gradients)


def test_bf16_autocast() -> None:
    """No further from the fp32 truth than the reference under the same autocast, by half."""
    reference, kernels = twins(BASE)
    inputs = example(reference)
    truth = reference(*inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rounded, actual = reference(*inputs), kernels(*inputs)
    assert relative_error(actual, truth) < 1.5 * relative_error(rounded, truth)


@pytest.mark.parametrize("batch", [1, 2])
def test_bf16_gradients(batch: int) -> None:
    """As close as `test_bf16_autocast`, all gradients end to end.

    Of two blocks: in more, a token whose head's output happens to be next to 0 makes rounding errors large in both.
    """
    reference, kernels = twins(replace(BASE, depth=2))
    inputs = example(reference, batch)
    truth = reference(*inputs)
    weight = torch.randn_like(truth)
    true_gradients = gradients_of(reference, truth, weight)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rounded, actual = reference(*inputs), kernels(*inputs)
    expected = relative_error(gradients_of(reference, rounded, weight), true_gradients)
    assert relative_error(gradients_of(kernels, actual, weight), true_gradients) < 1.5 * expected


class _Calls(TorchDispatchMode):
    """What of this project's operations is called, and with which arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.seen.append((str(func), args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
def test_without_gradients_nothing_is_kept(batch: int) -> None:
    """SwiGLU's input is the largest tensor of a block, and only a backward pass reads it."""
    _, kernels = twins(replace(BASE, depth=2))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), _Calls() as calls:
            kernels(*example(kernels, batch))
        assert [args[-1] for name, args in calls.seen if name == "dig.project_up.default"] == [gradients] * 2


def test_weights_cast_in_a_gemm_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next block's weights, cast in a block's up-projection GEMM or by a kernel of their own."""
    wide = replace(sm90.PRODUCTS.wide["up alone"], depth=16)
    monkeypatch.setattr(products, "tiles_for", lambda which, tokens, F: wide if which == "up alone" else None)
    _, kernels = twins(replace(BASE, width=128, heads=2, depth=2, variant="release"))
    inputs = example(kernels, 1)
    fused = 0
    prepare = raster_weights.project_up_preparing

    def count(*arguments: Any) -> list[Tensor]:
        nonlocal fused
        fused += products.fuses_cast(arguments[0], len(arguments[1]) // 2, arguments[2], len(arguments[3]))
        return prepare(*arguments)

    monkeypatch.setattr(raster_weights, "project_up_preparing", count)
    outputs = []
    for narrowest in (0, 1000):
        choices = replace(INTERPRETER.products, narrow_width=narrowest, share=(128, 128))
        monkeypatch.setattr(products, "for_device", lambda _, own=choices: replace(INTERPRETER, products=own))
        with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
            outputs.append(kernels(*inputs))
    assert fused == 1
    assert torch.equal(*outputs)


@pytest.mark.parametrize("tokens", [1, 6, 15])
def test_a_projection_in_halves(tokens: int) -> None:
    x, weight = torch.randn(1, tokens, 48, device=DEVICE), torch.randn(50, 48, device=DEVICE)
    found = raster_inference._linear_in_halves(x, weight)
    assert found.shape == (1, tokens, 50)
    assert relative_error(found, x.double() @ weight.double().T) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_it_compiles_as_one_graph(recomputed: bool) -> None:
    """Forward and backward with no graph break; aot_eager traces all that inductor would, without its compiler."""
    _, kernels = twins(replace(BASE, depth=1 if recomputed else 2))
    if recomputed:
        checkpoint_blocks(kernels, preserve_rng_state=False)
    inputs = example(kernels)
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    output = compiled(*inputs)
    output.square().mean().backward()
    gradients = [p.grad.clone() for p in kernels.parameters()]
    kernels.zero_grad()
    plain = kernels(*inputs)
    plain.square().mean().backward()
    torch.testing.assert_close(output, plain)
    for compiled_gradient, parameter in zip(gradients, kernels.parameters(), strict=True):
        torch.testing.assert_close(compiled_gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes these tiles anyway")
def test_tiles_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that a GPU would run, every address of theirs checked (`tests/ops/conftest.py`)."""
    monkeypatch.setattr(launches, "tiles_for", lambda q, v: sm90.GLA[36, 72, torch.float32])
    monkeypatch.setattr(adaln, "tiles_for", lambda x: sm90.ADALN[384, x.dtype])
    monkeypatch.setattr(srem, "tiles_for", lambda which, x: sm90.SREM[which, x.dtype])
    monkeypatch.setattr(swiglu, "tiles_for", lambda gate_up: sm90.SWIGLU[gate_up.dtype])
    test_output_and_every_gradient_in_fp32("heads of 36", 1)


@pytest.mark.slow
@pytest.mark.parametrize(("autocast", "batch"), [(False, 1), (True, 2)])
def test_recomputed_blocks_give_the_same_bits_from_less_memory(autocast: bool, batch: int) -> None:
    """Output and every gradient; and of what autograd keeps between the passes, what remains is the blocks' inputs."""
    _, kernels = twins(replace(BASE, depth=2))
    inputs = example(kernels, batch)
    parameters = {p.data_ptr() for p in kernels.parameters()}
    results, kept = [], []
    for recomputed in (False, True):
        if recomputed:
            assert checkpoint_blocks(kernels, preserve_rng_state=False) == 2
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if tensor.data_ptr() not in parameters:
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
                output = kernels(*inputs)
            kept.append(sum(sizes.values()))
        weight = torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)
        results.append((output.detach(), gradients_of(kernels, output, weight)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    # What is handed to a block is held by `checkpoint`, where the hooks don't see it.
    tokens = batch * 15 * BASE.width * (2 if autocast else 4)
    assert kept[1] + 2 * tokens < kept[0] / 3
