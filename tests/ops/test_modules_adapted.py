"""What others' tools make of DiG on its own kernels runs as they made it: adapters, masks, quantized, sharded weights.

Interpreted where there is no GPU, like all of these tests.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.utils import parametrize, prune

from tests.helpers import example, relative_error
from tests.ops.modules import CONFIG, DEVICE, _whole_fp32, gradients, model_of, twin_of  # noqa: F401 - a fixture is among them

LINEARS = ("in_proj", "decay_proj", "o_proj", "gate_proj", "down_proj", "adaLN_modulation.1")
"""Of a block; a model has more: the ends' are in `every_linear`."""


def every_linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


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
