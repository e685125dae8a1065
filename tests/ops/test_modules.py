"""DiG on its own kernels is an ordinary module: whoever wraps, hooks, adapts, prunes or shards a part sees it run.

Interpreted where there is no GPU, like all of these tests.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.utils import parametrize, prune

from dig.model import DiG, DiGConfig, SwiGLU
from tests.helpers import example, randomize, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = DiGConfig(
    input_size=(4, 6), depth=2, width=64, heads=1, num_classes=3, backend="triton", variant="release", scan="crisscross"
)
LINEARS = ("in_proj", "decay_proj", "o_proj", "gate_proj", "down_proj", "adaLN_modulation.1")
"""Of a block; a model has more: the ends' are in `every_linear`."""


@pytest.fixture(autouse=True)
def _whole_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's convolutions in fp32 on a GPU too, where PyTorch takes TF32 for them unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def model_of(config: DiGConfig = CONFIG) -> DiG:
    model: DiG = randomize(DiG(config)).eval().to(DEVICE)
    return model


def twin_of(model: DiG) -> DiG:
    """The same weights on the reference."""
    reference = DiG(replace(model.config, backend="reference")).eval()
    reference.load_state_dict(model.state_dict())
    return reference.to(DEVICE)


def names_of(config: DiGConfig) -> list[str]:
    """Every module that is called when the reference runs."""
    model = DiG(replace(config, backend="reference"))
    return [name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)]


def every_linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent)
    if isinstance(holder, nn.Sequential | nn.ModuleList):
        holder[int(leaf)] = module
    else:
        setattr(holder, leaf, module)


def gradients(model: nn.Module, output: Tensor, weight: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (output.float() * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Wrapper(nn.Module):
    """Somebody's own: has nothing of what it wraps but a call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.inner(*arguments, **options)


@functools.cache
def plain_run(config: DiGConfig, batch: int) -> tuple[DiG, tuple[Tensor, Tensor, Tensor], Tensor]:
    """A model with nothing attached to it, inputs and what it makes of them: with gradients, where there are more."""
    model = model_of(config)
    inputs = example(model, batch)
    with torch.set_grad_enabled(batch > 1):
        return model, inputs, model(*inputs).detach()


PAPER = replace(CONFIG, variant="paper", skip="linear", depth=4)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((replace(CONFIG, depth=1), name) for name in names_of(replace(CONFIG, depth=1))),
        *((PAPER, name) for name in ("blocks.0.norm1", "blocks.1.norm2", "blocks.3.skip_linear", "blocks.2")),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_module_that_is_wrapped_is_called(config: DiGConfig, name: str, batch: int) -> None:
    """With one image no gradients, and gates act on weights; with two all are asked for."""
    model, inputs, expected = plain_run(config, batch)
    model = copy.deepcopy(model)
    with torch.set_grad_enabled(batch > 1):
        wrapper = Wrapper(model.get_submodule(name))
        replace_module(model, name, wrapper)
        found = model(*inputs)
    assert wrapper.calls == 1
    assert relative_error(found, expected) < 1e-5


def test_hooks_fire_on_every_module() -> None:
    """Forward, before it, and backward; each as often as the module is called, and with what it computes."""
    model = model_of()
    inputs = example(model)
    expected = model(*inputs)
    weight = torch.randn_like(expected)
    wanted = gradients(model, expected, weight)
    called: dict[tuple[str, str], int] = {}
    for name in names_of(CONFIG):
        module = model.get_submodule(name)

        def count(*_: Any, name: str = name, kind: str = "") -> None:
            called[name, kind] = called.get((name, kind), 0) + 1

        module.register_forward_pre_hook(lambda *a, c=count: c(kind="before"))
        module.register_forward_hook(lambda *a, c=count: c(kind="after"))
        module.register_full_backward_hook(lambda *a, c=count: c(kind="backward"))
    found = model(*inputs)
    assert relative_error(found, expected) < 1e-5
    for name, gradient in gradients(model, found, weight).items():
        assert relative_error(gradient, wanted[name]) < 1e-3, name
    assert called == {(name, kind): 1 for name in names_of(CONFIG) for kind in ("before", "after", "backward")}


def test_a_hook_can_change_what_a_block_hands_on() -> None:
    """A block keeps its fused form when only it is hooked, and its output is not written over by the next one."""
    model = model_of()
    inputs = example(model, 1)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        model(*inputs)
        before = seen[0].clone()
        model.blocks[1].register_forward_pre_hook(lambda module, arguments: (arguments[0] * 0.5, *arguments[1:]))
        halved = model(*inputs)
    assert torch.equal(seen[0], before)
    reference = twin_of(model)
    reference.blocks[1].register_forward_pre_hook(lambda module, arguments: (arguments[0] * 0.5, *arguments[1:]))
    with torch.no_grad():
        assert relative_error(halved, reference(*inputs)) < 1e-4


def test_a_global_hook_sees_every_module() -> None:
    model = model_of(replace(CONFIG, depth=1))
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        with torch.no_grad():
            model(*example(model, 1))
    finally:
        handle.remove()
    assert {id(module) for module in called} >= {id(model.get_submodule(name)) for name in names_of(model.config)}


def test_a_forward_that_was_replaced_is_what_runs() -> None:
    """As accelerate's hooks do it: on the instance."""
    model = model_of(replace(CONFIG, depth=1))
    linear = model.blocks[0].mlp.down_proj
    inputs = example(model, 1)
    linear.forward = lambda x: nn.functional.linear(x, 2 * linear.weight)
    with torch.no_grad():
        found = model(*inputs)
        del linear.forward
        linear.weight.mul_(2)
        assert relative_error(found, model(*inputs)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_every_linear_layer(dtype: torch.dtype) -> None:
    """PEFT's: output and adapters' gradients are the reference's, the weights stay frozen."""
    peft = pytest.importorskip("peft")
    model = model_of()
    reference = twin_of(model)
    inputs = example(model)
    adapted = []
    for base in (reference, model):
        config = peft.LoraConfig(r=4, target_modules=every_linear(base), init_lora_weights=False)
        torch.manual_seed(1)
        adapted.append(peft.get_peft_model(base, config).eval())
    assert sum("lora_A" in name for name, _ in model.named_modules()) >= len(LINEARS) * CONFIG.depth
    results = []
    for network in adapted:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = network(*inputs)
        weight = torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)
        results.append((output, gradients(network, output, weight)))
    truth = adapted[0](*inputs) if dtype == torch.bfloat16 else results[0][0]
    rounded = relative_error(results[0][0], truth)
    (_, expected), (output, found) = results
    assert relative_error(output, truth) < max(1e-4, 1.5 * rounded)
    assert found.keys() == expected.keys()
    assert all("lora" in name for name in found)
    flat = [torch.cat([g[name].flatten().float() for name in sorted(g)]) for g in (found, expected)]
    assert relative_error(*flat) < (1e-3 if dtype == torch.float32 else 0.1)


def test_parametrized_weights() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = model_of()
    inputs = example(model)
    plain = copy.deepcopy(model)
    for name in ("blocks.0.attn.in_proj", "blocks.1.mlp.down_proj", "blocks.0.dw_conv", "final_layer.linear"):
        parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
        with torch.no_grad():
            plain.get_submodule(name).weight.mul_(2)
    parametrize.register_parametrization(model.blocks[1].attn, "norm_weight", Doubled())
    with torch.no_grad():
        plain.blocks[1].attn.norm_weight.mul_(2)
    assert relative_error(model(*inputs), plain(*inputs)) < 1e-5


def test_pruning_masks() -> None:
    model = model_of(replace(CONFIG, depth=1))
    inputs = example(model, 1)
    prune.l1_unstructured(model.blocks[0].attn.o_proj, "weight", amount=0.5)
    with torch.no_grad():
        pruned = model(*inputs)
        prune.remove(model.blocks[0].attn.o_proj, "weight")
        assert (model.blocks[0].attn.o_proj.weight == 0).float().mean() > 0.4
        assert relative_error(pruned, model(*inputs)) < 1e-5


def test_a_layer_that_got_a_bias_uses_it() -> None:
    model = model_of(replace(CONFIG, depth=1))
    inputs = example(model, 1)
    mlp = model.blocks[0].mlp
    biased = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features, device=DEVICE)
    with torch.no_grad():
        biased.weight.copy_(mlp.down_proj.weight)
    mlp.down_proj = biased
    reference = twin_of(model_of(replace(CONFIG, depth=1)))
    reference.blocks[0].mlp.down_proj = nn.Linear(biased.in_features, biased.out_features, device=DEVICE)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert relative_error(model(*inputs), reference(*inputs)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_frozen_parameters_get_no_gradient_and_change_no_other(batch: int) -> None:
    model = model_of()
    inputs = example(model, batch)
    output = model(*inputs)
    weight = torch.randn_like(output)
    everything = gradients(model, output, weight)
    frozen = {name for i, (name, _) in enumerate(model.named_parameters()) if "blocks.0" in name or i % 3 == 0}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    found = gradients(model, model(*inputs), weight)
    assert found.keys() == everything.keys() - frozen
    for name, gradient in found.items():
        assert torch.equal(gradient, everything[name]), name


def test_a_copy_is_another_model() -> None:
    model = model_of()
    inputs = example(model)
    expected = model(*inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(*inputs), expected)
    randomize(twin)
    assert torch.equal(model(*inputs), expected)
    assert not torch.equal(twin(*inputs), expected)


def test_parameters_given_from_outside() -> None:
    """`torch.func.functional_call`, which puts plain tensors in the parameters' place."""
    model = model_of(replace(CONFIG, depth=1))
    inputs = example(model)
    doubled = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.functional_call(model, doubled, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert relative_error(found, model(*inputs)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("implementation", list(CheckpointImpl))
def test_checkpoint_wrapper_around_blocks(implementation: CheckpointImpl) -> None:
    model = model_of()
    inputs = example(model)
    expected = model(*inputs)
    weight = torch.randn_like(expected)
    wanted = gradients(model, expected, weight)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=implementation)
    found = model(*inputs)
    assert relative_error(found, expected) < 1e-6
    for name, gradient in gradients(model, found, weight).items():
        assert relative_error(gradient, wanted[name.replace("_checkpoint_wrapped_module.", "")]) < 1e-4, name


def test_weight_only_int8_runs_on_the_quantized_weights() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = model_of(replace(CONFIG, depth=1))
    reference = twin_of(model)
    inputs = example(model)
    with torch.no_grad():
        exact = reference(*inputs)
        for network in (model, reference):
            # Without what it would set for the whole process, TF32 among it.
            torchao.quantize_(network, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
        expected, found = reference(*inputs), model(*inputs)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(found, exact) > 1e-3  # else nothing was quantized


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("recomputed", [False, True])
def test_fully_shard_by_block(recomputed: bool) -> None:
    """FSDP2 gathers a block's weights when the block is called, and takes them away after it."""
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    inputs = example(model)
    expected = model(*inputs)
    weight = torch.randn_like(expected)
    wanted = gradients(model, expected, weight)
    if recomputed:
        model.recompute_blocks(preserve_rng_state=False)
    mesh = torch.distributed.init_device_mesh(DEVICE, (1,))
    gathered = []
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        block.register_forward_pre_hook(lambda module, _: gathered.append(module))
    fully_shard(model, mesh=mesh)
    found = model(*inputs)
    assert gathered == list(model.blocks)
    assert relative_error(found.detach(), expected) < 1e-5
    model.zero_grad()
    (found.float() * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad.full_tensor(), wanted[name]) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("attached", ["hook", "lora", "convolution"])
def test_checkpointing_goes_with_what_is_attached_inside_of_a_block(attached: str) -> None:
    model = model_of(replace(CONFIG, depth=1))
    inputs = example(model)
    network: nn.Module = model
    if attached == "lora":
        peft = pytest.importorskip("peft")
        network = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    else:
        part = model.blocks[0].dw_conv if attached == "convolution" else model.blocks[0].mlp
        part.register_forward_hook(lambda module, arguments, output: 2 * output)
    output = network(*inputs)
    weight = torch.randn_like(output)
    expected = gradients(network, output, weight)
    model.recompute_blocks(preserve_rng_state=False)
    found = gradients(network, network(*inputs), weight)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


def test_layers_of_the_same_class_but_other_settings_are_called() -> None:
    model = model_of(replace(CONFIG, depth=1))
    reference = twin_of(model)
    inputs = example(model, 1)
    scale = torch.full((64,), 3.0, device=DEVICE)
    for network in (model, reference):
        network.x_embedder.proj = nn.Conv2d(4, 64, 2, stride=2, dilation=3, padding=1).to(DEVICE)
        network.blocks[0].norm1.weight = nn.Parameter(scale.clone())
        network.y_embedder.embedding_table.max_norm = 0.1
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        assert relative_error(model(*inputs), reference(*inputs)) < 1e-4


def test_a_forward_replaced_in_the_class_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(replace(CONFIG, depth=1))
    called = []
    plain = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: called.append(self) or plain(self, x))
    with torch.no_grad():
        model(*example(model, 1))
    assert called == [model.blocks[0].mlp]
