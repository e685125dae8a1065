"""DiG on its own kernels is an ordinary module: whoever wraps, hooks or replaces a part sees it run.

Interpreted where there is no GPU, like all of these tests.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dig.model import DiG, DiGConfig, SwiGLU
from tests.helpers import example, randomize, relative_error
from tests.ops.modules import CONFIG, DEVICE, _whole_fp32, gradients, model_of, twin_of  # noqa: F401 - a fixture is among them


def names_of(config: DiGConfig) -> list[str]:
    """Every module that is called when the reference runs."""
    model = DiG(replace(config, backend="reference"))
    return [name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent)
    if isinstance(holder, nn.Sequential | nn.ModuleList):
        holder[int(leaf)] = module
    else:
        setattr(holder, leaf, module)


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
@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_module_that_is_wrapped_is_called(config: DiGConfig, name: str, batch: int) -> None:
    """With one image no gradients, and gates act on weights; with two all are asked for, as hooks below see, too."""
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
