"""Which derivatives this project's kernels have: first ones, by a backward pass. Others are refused, in one line each.

Unchecked, PyTorch would fail deep inside a kernel's registration, or silently leave out what a fused pass hides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

_INSTEAD = "take backend 'reference' for them"
_TRANSFORMS = {
    torch._C._functorch.TransformType.Grad: "derivatives by torch.func (grad, vjp, jacrev)",
    torch._C._functorch.TransformType.Jvp: "forward-mode derivatives",
    torch._C._functorch.TransformType.Vmap: "rule for torch.func.vmap",
}


def refuse_transforms() -> None:
    """Raise ValueError under one of torch.func's transforms, or where forward-mode derivatives are asked for."""
    asked = _transform()
    if forward_ad._current_level >= 0:
        asked = asked or "forward-mode derivatives"
    if asked is not None:
        raise ValueError(f"backend 'triton' has no {asked}; {_INSTEAD}")


def _transform() -> str | None:
    """What the innermost of torch.func's transforms asks for."""
    transform = torch._C._functorch.peek_interpreter_stack()
    return None if transform is None else _TRANSFORMS.get(transform.key())


def refuse_export() -> None:
    """Raise ValueError where torch.export traces what autograd is told by a node: it would leave out the gradient."""
    if _exporting():
        raise ValueError("torch.export would lose gradients of backend 'triton': export under torch.no_grad()")


def _exporting() -> bool:
    return torch.compiler.is_exporting()


# What `torch.compiler.assume_constant_result` does, which would import the compiler: a trace asks, instead of tracing
# the question, to which PyTorch 2.11's has an answer of its own. The compiler itself guards on the transforms that a
# trace was made under.
for _asked in (_transform, _exporting):
    vars(_asked)["_dynamo_marked_constant"] = True


def once(backward: Callable[P, R]) -> Callable[P, R]:
    """Let a backward pass refuse, by ValueError, to be differentiated itself: see `refuse_second_derivatives`."""

    @functools.wraps(backward)
    def checked(*arguments: P.args, **named: P.kwargs) -> R:
        refuse_second_derivatives()
        return backward(*arguments, **named)

    return checked


def refuse_second_derivatives() -> None:
    """Raise ValueError in a backward pass that is recorded for another one.

    The second pass itself would be too late: part of what it needs is never recorded, and its result could be wrong.
    Within torch.compile too, which may compile a backward pass by itself where it leaves its call to Python.
    """
    if torch.is_grad_enabled():
        raise ValueError(f"backend 'triton' has no second derivatives, which create_graph=True asks for; {_INSTEAD}")
