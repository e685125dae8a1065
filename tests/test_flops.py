"""FLOPs as the counter finds them, against the formulas: those written by hand here are the truth."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from baselines.dis import EXTRA_TOKENS, STATE, DiS
from baselines.dit import DiT
from bench.measure.flops import step_flops
from dig.flops import UncountedError, counts_as, forward_macs, model_macs
from dig.layers import Backbone
from dig.model import DiG
from dig.ops.gla.projection import GATE_RANK
from dig.packages import is_installed
from dig.registry import find_family, parse_name
from dig.spec import ModelSpec, create_model
from tests.helpers import example

OWN = ("DiG", "DiT", "Flash-DiT", "DiS")


def _frame(model: Backbone, T: int, D: int, time_input: int, time_hidden: int) -> int:
    """Patch embedding, timestep MLP, output head."""
    patch = model.patch_size**2 * model.in_channels
    return T * patch * D + time_input * time_hidden + time_hidden * D + 2 * D * D + T * D * 2 * patch


def _dig(model: DiG) -> int:
    config, T = model.config, model.grid[0] * model.grid[1]
    D, F = config.width, config.ffn_width
    K, V = D // 2 // config.heads, D // config.heads
    projections = D * (D // 2) * 2 + 3 * D * D + D * GATE_RANK + GATE_RANK * D // 2
    recurrence = 2 * config.heads * K * V  # k_t^T v_t into the state, q_t times the state
    convolution = 0 if config.convolution == "none" else 9 * D
    block = T * (projections + recurrence + 3 * D * F + convolution) + 6 * D * D
    return config.depth * block + _frame(model, T, D, model.t_embedder.frequencies, D)


def _dit(model: DiT) -> int:
    config, T = model.config, model.grid[0] * model.grid[1]
    D = config.width
    block = T * (4 * D * D + 2 * T * D + 8 * D * D) + 6 * D * D
    return config.depth * block + _frame(model, T, D, model.t_embedder.frequencies, D)


def _dis(model: DiS) -> int:
    D, E = model.config.width, 2 * model.config.width
    patches = model.grid[0] * model.grid[1]
    T = patches + EXTRA_TOKENS
    rank = math.ceil(D / 16)
    direction = E * 4 + E * (rank + 2 * STATE) + rank * E + 9 * E * STATE // 2
    mixer = T * (D * 2 * E + 2 * direction + E * D)
    half = model.config.depth // 2
    return (2 * half + 1) * mixer + half * T * 2 * D * D + _frame(model, patches, D, D, 4 * D)


def truth(model: Backbone) -> int:
    """Multiply-adds of a forward pass for one image, by formula. T tokens, D width, H heads, K, V widths of a head."""
    formulas: dict[type, Any] = {DiG: _dig, DiT: _dit, DiS: _dis}
    return int(formulas[type(model)](model))


def spec_of(name: str, side: int = 32, **options: str) -> ModelSpec:
    return ModelSpec(name=name, options=options, input_size=(side, side), in_channels=4, num_classes=10)


def built(spec: ModelSpec) -> Backbone:
    with torch.device("meta"):
        return spec.build()


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(f"{family}-{size}/2", marks=() if size in ("S", "B") else pytest.mark.slow)
            for family in OWN
            for size in find_family(family).sizes
        ),
        *(f"{family}-S/{patch}" for family in OWN for patch in (4, 8)),
    ],
)
def test_every_model_counts_as_its_formula_says(name: str) -> None:
    spec = spec_of(name)
    assert model_macs(spec) == truth(built(spec))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((f"{family}-S/4", {"backend": backend}) for family in OWN for backend in find_family(family).backends),
        *(("DiG-S/2", {"scan": scan}) for scan in ("bidirectional", "causal")),
        ("DiG-S/2", {"variant": "release", "convolution": "none"}),
    ],
)
def test_what_runs_it_changes_nothing(name: str, options: dict[str, str]) -> None:
    spec = spec_of(name, **options)
    reference = built(spec_of(name, **{**options, "backend": find_family(parse_name(name)[0].name).backends[0]}))
    assert model_macs(spec) == truth(reference)


def test_dig_s_2_at_256_takes_5_57_gmac() -> None:
    assert round(model_macs(spec_of("DiG-S/2")) / 1e9, 2) == 5.57


@pytest.mark.parametrize("backend", ["sdpa-flash", "sdpa-cudnn"])
def test_fused_attention_of_torch_counts_by_itself(backend: str) -> None:
    model = built(spec_of("Flash-DiT-S/4", backend=backend))
    assert forward_macs(model) == truth(model)


@pytest.mark.parametrize("convolution", ["identity-init", "none"])
def test_operations_of_this_project_have_formulas_that_add_up(convolution: str) -> None:
    """On fake tensors of a CPU, so that nothing runs; Triton's interpreter lets the kernels' checks pass."""
    pytest.importorskip("dig.raster")
    spec = spec_of("DiG-S/8", side=16, backend="triton", convolution=convolution)
    assert forward_macs(built(spec)) == truth(built(spec))


def test_every_operation_of_this_project_has_a_formula() -> None:
    pytest.importorskip("dig.raster")
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dig::")}
    assert len(names) > 15
    assert {n for n in names if getattr(torch.ops.dig, n.removeprefix("dig::")) not in flop_registry} == set()


@pytest.mark.slow
def test_a_training_step_of_the_kernels_counts_as_three_forward_passes() -> None:
    """FlopCounterMode alone, forward and backward, but for what a block computes again and inputs without gradients.

    The counter hooks every module, so blocks run part by part here. PyTorch's own formula takes the backward pass of a
    depth-wise convolution for that of a dense one.
    """
    pytest.importorskip("dig.raster")

    def convolution_backward(dout: list[int], x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        return 2 * 2 * math.prod(dout) * math.prod(weight[1:])

    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    with FakeTensorMode():
        model = create_model("DiG-S/8", input_size=(32, 32), num_classes=10, backend="triton")
        x, t, y = example(model, 2)
        with FlopCounterMode(display=False) as forward:
            loss = model(x, t, y).square().mean()
        with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
            loss.backward()
    assert forward.get_total_flops() == 2 * 2 * truth(model)
    assert backward.get_total_flops() == pytest.approx(2 * forward.get_total_flops(), rel=0.02)


def test_dit_counts_in_a_real_pass_as_it_does_without_one() -> None:
    model = create_model("DiT-S/4", image_size=64)
    with FlopCounterMode(display=False) as counter:
        model(*example(model, 1))
    assert counter.get_total_flops() == 2 * forward_macs(model)


def test_counting_leaves_the_model_as_it_is() -> None:
    model = create_model("DiG-S/8", image_size=64).train()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert forward_macs(model) == truth(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_training_step_is_three_forward_passes() -> None:
    spec = spec_of("DiS-S/2")
    assert step_flops(spec, batch=2, mode="train") == 6 * step_flops(spec, batch=1, mode="forward")
    assert step_flops(spec, batch=1, mode="forward") == 2 * model_macs(spec)


class Stack(Backbone):
    """Equal blocks, which do what they are told."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(input_size=(4, 4), in_channels=4, patch_size=2, num_classes=3)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return torch.cat([x, x], 1)


class Repeated(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.linear = times, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.linear(x)
        return x


def test_blocks_of_equal_weights_count_once_each_by_what_they_do() -> None:
    """Blocks that differ in nothing but a number are not taken for equal."""
    one = 64 * 4
    assert forward_macs(Stack(Repeated(1), Repeated(1), Repeated(1))) == 3 * one
    assert forward_macs(Stack(Repeated(1), Repeated(3), Repeated(1))) == 5 * one


def test_an_operation_without_a_formula_is_refused_by_name() -> None:
    @torch.library.custom_op("strangers::product", mutates_args=())
    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    product.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + product(x.reshape(16, 4), x.new_empty(4, 4)).sum()

    with pytest.raises(UncountedError, match=r"strangers::product has no formula; give it one with .*register_flop"):
        forward_macs(Stack(Block()))


def test_a_function_of_no_operation_says_what_it_needs() -> None:
    def kernel(x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)

    class Block(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):  # which has no device meta
                return self.function(x)

    with pytest.raises(UncountedError, match=r"Stack were not counted: .*; say what .* with dig.flops.counts_as"):
        forward_macs(Stack(Block(kernel)))
    declared = counts_as(lambda x: 2 * 100, torch.empty_like)(kernel)
    assert forward_macs(Stack(Block(declared))) == 100
    assert torch.equal(declared(torch.ones(2)), 2 * torch.ones(2))


def test_flash_attention_has_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a package in its place that has its operation."""
    if is_installed("flash_attn"):
        pytest.skip("flash-attn itself is installed: its operation cannot be defined a second time")

    @torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.clone()

    forward.register_fake(lambda q, k, v: torch.empty_like(q))
    module = ModuleType("flash_attn")
    module.flash_attn_func = lambda q, k, v, deterministic: forward(q, k, v)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr("dig.packages.is_installed", lambda name: True)
    model = built(spec_of("Flash-DiT-S/4", backend="flash-attn"))
    assert forward_macs(model) == truth(model)
