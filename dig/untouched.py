"""Which modules a fused pass may compute in their place, and which have to be called.

A fused pass reads the weights of several modules and computes at once what they would one by one. That is right only as
long as each is what the model was built with. Whatever else somebody made of it would be skipped without a word: a
hook, an adapter, a parametrization, a pruning mask, a quantized weight, another ``forward``. So a fused pass asks here
for every module that it doesn't call, and where one isn't untouched, that one is called.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

M = TypeVar("M", bound=nn.Module)

_PLAIN = (nn.Parameter, Tensor)
"""Types of a weight that is no more than its numbers. Every subclass may compute something else than they say."""
_FORWARDS: dict[type[nn.Module], object] = {
    kind: kind.forward for kind in (nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.Linear, nn.Sequential, nn.SiLU)
}
"""What each class computes, as it was when nobody had replaced it yet."""


def fusible(kind: type[M]) -> type[M]:
    """Decorate a module's class whose ``forward`` a fused pass may replace; others never are `untouched`."""
    _FORWARDS[kind] = kind.forward
    return kind


def untouched(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether calling the module would run ``kind.forward``, as it was written, on plain weights and nothing else.

    Kernels read weights as they lie, so one that isn't contiguous is none of these either.

    Of this one module; its children are asked for by whoever wants to skip them too.
    """
    own = module.__dict__
    if (
        type(module) is not kind
        or kind.forward is not _FORWARDS.get(kind)
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or nn_module._has_any_global_hook()
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
    ):
        return False
    # A loop, for this is asked of every module in every step.
    for weight in own["_parameters"].values():
        if weight is not None and not (type(weight) in _PLAIN and weight.is_contiguous()):
            return False
    return True


def parameter(module: nn.Module, name: str) -> Any:
    """A module's parameter or None, as by attribute, which a module looks up in Python: in every step, that adds up.

    Whoever replaces one by a plain tensor (FSDP's flat parameters) leaves it where attributes are.
    """
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def untouched_linear(module: nn.Module, *, bias: bool) -> bool:
    """`untouched`, of a linear layer that has a bias, or has none."""
    return untouched(module, nn.Linear) and (parameter(module, "bias") is not None) == bias


def untouched_adaln(module: nn.Module) -> bool:
    """`untouched`, of adaLN's ``Sequential(SiLU, Linear)`` and both of its parts."""
    if not untouched(module, nn.Sequential):
        return False
    parts: list[Any] = list(module._modules.values())
    return len(parts) == 2 and untouched(parts[0], nn.SiLU) and untouched_linear(parts[1], bias=True)


def untouched_layer_norm(module: nn.Module, eps: float) -> bool:
    """`untouched`, of a LayerNorm over the last dimension without weight and bias."""
    return (
        untouched(module, nn.LayerNorm)
        and all(weight is None for weight in module._parameters.values())
        and module.eps == eps
        and len(module.normalized_shape) == 1
    )


def untouched_convolution(module: nn.Module, kind: type[nn.Conv2d]) -> bool:
    """`untouched`, of a convolution with a bias that pads with zeros and leaves nothing out."""
    return (
        untouched(module, kind)
        and module.bias is not None
        and module.padding_mode == "zeros"
        and module.dilation == (1, 1)
    )
